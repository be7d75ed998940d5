"""vLLM in a process of its own: its environment's Python runs this file; JSON lines go in and out.

In: {"model": folder, "max_model_len", "max_requests", "threads"}, answered with {"ready": version};
then {"prompts": [[id]], "new_tokens"}, answered with {"tokens": [[id]]}, until the input ends. An
error is answered with {"error": text}. Imports nothing of ours.
"""

import json
import os
import sys

del sys.path[0]  # this folder, whose modules are not meant for others

KV_GIB = "1"


def main() -> None:
    # vLLM prints; the answers keep stdout for themselves.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        serve(answers)
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=answers)


def serve(answers) -> None:
    about = json.loads(sys.stdin.readline())
    own = (
        os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    )
    cores = sorted(own)[: about["threads"]]
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": KV_GIB,
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": str(about["threads"]),
    }
    import vllm

    llm = vllm.LLM(
        model=about["model"],
        skip_tokenizer_init=True,
        dtype="bfloat16",
        enable_prefix_caching=False,
        max_model_len=about["max_model_len"],
        max_num_seqs=about["max_requests"],
        disable_log_stats=True,
    )
    print(json.dumps({"ready": vllm.__version__}), file=answers)
    for line in sys.stdin:
        job = json.loads(line)
        params = vllm.SamplingParams(
            max_tokens=job["new_tokens"], temperature=0, ignore_eos=True, detokenize=False
        )
        prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        print(json.dumps({"tokens": tokens}), file=answers)


if __name__ == "__main__":
    main()
