"""OpenVINO GenAI's own pipeline with continuous batching, in process. MODEL is in OpenVINO's format here."""

import numpy as np
import openvino
import openvino_genai

from scripts.bench import load, lockstep


def main() -> None:
    options = lockstep.arguments()
    room = openvino_genai.SchedulerConfig()
    room.max_num_seqs = load.MIXED_CLIENTS
    room.num_kv_blocks = 512  # of 32 tokens: all that 64 clients ask for
    precision = {"bf16": "bf16", "fp32": "f32"}[options.dtype]
    settings = {"INFERENCE_NUM_THREADS": options.threads, "INFERENCE_PRECISION_HINT": precision}
    pipeline = openvino_genai.ContinuousBatchingPipeline(str(options.model), room, "CPU", settings)
    wanted = openvino_genai.GenerationConfig(max_new_tokens=load.NEW_TOKENS, ignore_eos=True)

    def generate(prompts: list[list[int]]) -> None:
        found = pipeline.generate(
            [openvino.Tensor(np.array([prompt], np.int64)) for prompt in prompts], [wanted] * len(prompts)
        )
        assert {len(one.m_generation_ids[0]) for one in found} == {load.NEW_TOKENS}

    lockstep.drive(options, generate)


if __name__ == "__main__":
    main()
