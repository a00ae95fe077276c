"""One side of lm_eval.py, in .venv-lm-eval: scores the tasks beside this file, and prints the scores as JSON.

    python -m scripts.bench.lm_eval_side MODEL [--port PORT --served-as NAME]

Without a port the model runs here (the harness's `hf`); with one, the server there is asked (`local-completions`).
"""

import argparse
import json
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager

TASKS = Path(__file__).parent / "lm_eval_tasks"
MAX_LENGTH = 1024  # tokens; none of the tasks' texts is longer, so none is cut


def main() -> None:
    parser = argparse.ArgumentParser(description="one side of lm_eval.py")
    parser.add_argument("model", help="a directory")
    parser.add_argument("--port", type=int)
    parser.add_argument("--served-as")
    options = parser.parse_args()
    kind, settings = "hf", {"pretrained": options.model, "dtype": "float32", "max_length": MAX_LENGTH}
    if options.port:
        kind, settings = (
            "local-completions",
            {
                "model": options.served_as,
                "base_url": f"http://127.0.0.1:{options.port}/v1/completions",
                "tokenizer": options.model,
                "tokenizer_backend": "huggingface",
                "tokenized_requests": True,
                "num_concurrent": 8,
                "max_length": MAX_LENGTH,
            },
        )
    names = [path.stem for path in sorted(TASKS.glob("*.yaml"))]
    found = lm_eval.simple_evaluate(
        model=kind,
        model_args=settings,
        tasks=[f"manta_{name}" for name in names],
        device="cpu",
        batch_size=1,
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
    )
    scores = {
        f"{task.removeprefix('manta_')}, {metric.removesuffix(',none')}": value
        for task, metrics in found["results"].items()
        for metric, value in metrics.items()
        if metric.endswith(",none") and "stderr" not in metric
    }
    likelihoods = [
        first(response)
        for task in sorted(found["samples"])
        for sample in sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
        for response in sample["filtered_resps"]
    ]
    print(json.dumps({"scores": scores, "loglikelihoods": likelihoods}))


def first(response: float | list[float]) -> float:
    """A log-likelihood: multiple choice has, beside each, whether greedy decoding would have said the same."""
    return float(response[0] if isinstance(response, list | tuple) else response)


if __name__ == "__main__":
    main()
