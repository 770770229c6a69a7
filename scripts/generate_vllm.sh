#!/usr/bin/env bash
# scripts/generate.sh with vLLM engines: one per GPU, or per TENSOR_PARALLEL GPUs; without a GPU, one on the CPU.
set -euo pipefail
BACKEND=vllm exec bash "$(dirname "${BASH_SOURCE[0]}")/generate.sh" "$@"
