"""``select: best``: the saved model is that of the checkpoint with the best held-out metric, by the means of transformers."""

from __future__ import annotations

from typing import Any

from spin.alignment.core.errors import InputError


def ask_for_best(arguments: Any) -> None:
    """Set what transformers needs to load the best checkpoint at the end; called before it checks its own keys.

    A checkpoint is evaluated when it is saved. ``save_total_limit`` keeps the best one in any case, next to the last ones.

    Raises:
        InputError: no checkpoints are saved, or keys ask for something else.
    """
    if arguments.select != "best":
        return
    saving = str(getattr(arguments.save_strategy, "value", arguments.save_strategy))
    if saving not in ("epoch", "steps"):
        raise InputError(f"select is best, but save_strategy is {saving}: set it to epoch or steps")
    evaluating = str(getattr(arguments.eval_strategy, "value", arguments.eval_strategy))
    if evaluating not in ("no", saving):
        raise InputError(
            f"select is best, but eval_strategy is {evaluating} and save_strategy {saving}: a checkpoint is evaluated when it is "
            "saved, so remove eval_strategy"
        )
    if arguments.save_only_model:
        raise InputError(
            "select is best, but save_only_model is true: the best checkpoint is loaded whole, remove the key"
        )
    arguments.eval_strategy, arguments.load_best_model_at_end = saving, True
    if saving == "steps":
        arguments.eval_steps = arguments.save_steps
    if arguments.metric_for_best_model is None:
        arguments.metric_for_best_model = "loss"


def selection(trainer: Any) -> dict[str, Any]:
    """Return the entry ``selected`` of ``metrics.json``: the step whose weights are saved, the metric and its value there.

    Empty if the last ones are saved.
    """
    if not trainer.args.load_best_model_at_end or trainer.state.best_global_step is None:
        return {}
    name = trainer.args.metric_for_best_model
    return {"selected": {"step": trainer.state.best_global_step, "metric": name, "value": trainer.state.best_metric}}
