# A GPU image with the pinned packages of setup.py, and `spin` as its entry point, run as a user without privileges.
#   docker build -t selfplay-spin --build-arg UID="$(id -u)" .
#   docker run --gpus all --ipc host -v "$PWD:/workspace" selfplay-spin run configs/zephyr_7b.yaml
# The driver of the host must support the CUDA version of the base image. Models and data are mounted, never part of the image.
# devel: DeepSpeed (CPU Adam, for offload) and vLLM (FlashInfer) compile kernels with nvcc and g++ when they are first used.
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04

ENV DEBIAN_FRONTEND=noninteractive
# python3-dev and the compilers: Triton, too, compiles its launchers when it first runs a kernel.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ git libc6-dev python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

# The user must be able to write to the mounted folder, so it has the id of the one who builds. Ubuntu 24.04 has given 1000, which
# most hosts give their first user, to a user `ubuntu`.
ARG UID=1000
RUN userdel --remove ubuntu && useradd --uid "$UID" --create-home spin && mkdir /opt/spin /workspace && chown spin /opt/spin /workspace
USER spin
ENV VIRTUAL_ENV=/opt/spin/venv HF_HOME=/workspace/.cache/huggingface
ENV PATH=$VIRTUAL_ENV/bin:$PATH PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1
RUN python3 -m venv "$VIRTUAL_ENV"

# Before the sources, so that a changed source file does not install torch again.
ARG TORCH=2.13.0
RUN pip install "torch==$TORCH"

COPY --chown=spin . /opt/spin/source
ARG EXTRAS=vllm,deepspeed,peft,math,ifeval,gguf
RUN pip install "/opt/spin/source[$EXTRAS]"

WORKDIR /workspace
ENTRYPOINT ["spin"]
CMD ["--help"]
