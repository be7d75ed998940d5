"""A dozen items of every kind of task."""

from __future__ import annotations

from typing import Any

WORDS = ["the", "a", "cat", "dog", "sees", "likes", "finds", "red", "blue", "old", "house", "river"]
LINES: dict[str, list[dict[str, Any]]] = {
    "piqa": [
        {
            "id": i,
            "context": f"Question: {w}\nAnswer:",
            "choices": ["a cat", "the dog sees"],
            "gold": 1,
        }
        for i, w in enumerate(WORDS)
    ],
    "arc_easy": [
        {
            "id": i,
            "context": f"Question: {w} cat",
            "choices": ["red", "old house", "x", "y"],
            "gold": 0,
        }
        for i, w in enumerate(WORDS)
    ],
    "winogrande": [
        {"id": i, "context_options": [f"{w} the", f"a {w}"], "continuation": "cat sees", "gold": 0}
        for i, w in enumerate(WORDS)
    ],
    "lambada_openai": [
        {"id": i, "context": f"the {w} likes the", "continuation": "cat"}
        for i, w in enumerate(WORDS)
    ],
    "mmlu": [
        {
            "id": i,
            "subject": "old_things",
            "question": f"What is {w}? ",
            "choices": ["cat", "dog", "red", "blue"],
            "gold": i % 4,
        }
        for i, w in enumerate(WORDS)
    ],
}
