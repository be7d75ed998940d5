"""OpenVINO GenAI in a process of its own, as `vllm_worker`: the same lines go in and out.

The transformers folder is exported by optimum-intel, weights not quantised. The pipeline has its
defaults, prefix caching apart.
"""

import json
import os
import sys
from pathlib import Path

del sys.path[0]  # this folder, whose modules are not meant for others

CACHE_GIB = 1


def main() -> None:
    # Exporting prints; the answers keep stdout for themselves.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        serve(answers)
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=answers)


def serve(answers) -> None:
    about = json.loads(sys.stdin.readline())
    import numpy as np
    import openvino
    import openvino_genai
    from optimum.intel import OVModelForCausalLM

    folder = str(Path(about["model"]) / "openvino")
    model = OVModelForCausalLM.from_pretrained(
        about["model"], export=True, compile=False, load_in_8bit=False
    )
    model.save_pretrained(folder)
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.enable_prefix_caching = False
    scheduler.cache_size = CACHE_GIB
    scheduler.max_num_seqs = about["max_requests"]
    settings = {"INFERENCE_NUM_THREADS": about["threads"]}
    pipe = openvino_genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", settings)
    print(json.dumps({"ready": openvino_genai.__version__}), file=answers)
    for line in sys.stdin:
        job = json.loads(line)
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = job["new_tokens"]
        config.ignore_eos = True
        config.do_sample = False
        ids = [openvino.Tensor(np.array([prompt], dtype=np.int64)) for prompt in job["prompts"]]
        outputs = pipe.generate(ids, [config] * len(ids))
        tokens = [list(output.m_generation_ids[0]) for output in outputs]
        print(json.dumps({"tokens": tokens}), file=answers)


if __name__ == "__main__":
    main()
