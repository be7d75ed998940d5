"""What `mor serve` is asked to do. Imports no torch."""

from __future__ import annotations

import hashlib
import hmac
import os
from dataclasses import dataclass
from pathlib import Path

from mor.config import check_choice
from mor.engine.config import Backend

DTYPES = ("auto", "float32", "bfloat16")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """Settings of the server. Raises ValueError, in one line, for what does not fit."""

    host: str = "127.0.0.1"
    """address to listen on; 0.0.0.0 lets other machines in, then give keys"""
    port: int = 8000
    """port to listen on; 0 takes a free one"""
    served_model_name: str = "mor"
    """name that requests must give, or leave out"""
    max_num_seqs: int = 32
    """requests that run at a time"""
    max_queue: int = 256
    """requests that may wait beside them; one more gets status 429"""
    max_model_len: int = 0
    """tokens of prompt and answer together, 0 for the model's"""
    kv_cache_bytes: int = 0
    """bytes of keys and values, 0 for what the requests need, at most 2 GiB"""
    request_timeout_s: float = 600.0
    """seconds after which a request is ended"""
    stall_timeout_s: float = 60.0
    """seconds that a reader of a stream may take for a piece before it is let go"""
    max_body_bytes: int = 2**21
    """bytes of a request's body; more get status 413"""
    drain_s: float = 30.0
    """seconds that requests have to end after SIGTERM"""
    api_key_file: Path | None = None
    """file of keys, one a line, of which a request must bring one; a line may hold sha256: and the
    hex of a key's SHA-256 instead. Only hashes are kept in memory"""
    api_key_env: str = "MOR_API_KEY"
    """environment variable with such a key"""
    cors_origins: tuple[str, ...] = ()
    """origins whose pages may ask from a browser; none unless given"""
    load_aware_depth: float = 0.0
    """mean depth to go down to while the queue fills, for requests that name none; 0 leaves depth
    alone"""
    log_prompts: bool = False
    """write what requests ask and get into the log"""
    dtype: str = "auto"
    """auto, float32 or bfloat16: of weights, keys and values; auto is bfloat16 where the processor
    multiplies it"""
    backend: Backend = "auto"
    """native: compiled for the CPU; triton: on a GPU; torch: plain; auto: the fastest to be had"""
    device: str = "auto"
    """cpu, cuda, or auto: a GPU where there is one"""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 2**16:
            raise ValueError(f"port is {self.port}; give one from 0 to 65535")
        if not self.served_model_name:
            raise ValueError("served_model_name is empty; give a name")
        for name in ("max_num_seqs", "max_body_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give 1 or more")
        for name in ("max_queue", "max_model_len", "kv_cache_bytes", "drain_s"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; give 0 or more")
        for name in ("request_timeout_s", "stall_timeout_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; give a number above 0")
        if self.load_aware_depth and not self.load_aware_depth >= 1:
            raise ValueError(
                f"load_aware_depth is {self.load_aware_depth}; give a mean depth of 1 or more, or 0"
            )
        check_choice("dtype", self.dtype, DTYPES)


class Keys:
    """The API keys: hashes alone, compared in constant time."""

    def __init__(self, config: ServeConfig) -> None:
        """Read file and environment; ValueError where one is given and holds no key."""
        found = []
        if config.api_key_file is not None:
            if not config.api_key_file.is_file():
                raise ValueError(f"{config.api_key_file} does not exist; give a file of keys")
            lines = config.api_key_file.read_text(encoding="utf-8-sig").split("\n")
            found = [line.strip() for line in lines if line.strip() and line[0] != "#"]
            if not found:
                raise ValueError(f"{config.api_key_file} holds no key; write one a line")
        told = os.environ.get(config.api_key_env)
        if told is not None:
            if not told.strip():
                raise ValueError(f"{config.api_key_env} is blank; set it to a key, or unset it")
            found.append(told.strip())
        self._hashes = [_known(key) for key in found]

    @property
    def are_wanted(self) -> bool:
        return bool(self._hashes)

    def allow(self, authorization: str) -> bool:
        """Tell whether an Authorization header brings one of the keys, or none is wanted."""
        kind, _, key = authorization.partition(" ")
        given = _hash(key.strip() if kind.lower() == "bearer" else "")
        matches = [hmac.compare_digest(given, known) for known in self._hashes]  # all, always
        return any(matches) or not self._hashes


def _known(line: str) -> bytes:
    """Return the hash that a line of the file stands for."""
    kind, _, digest = line.partition(":")
    if kind != "sha256":
        return _hash(line)
    try:
        known = bytes.fromhex(digest)
    except ValueError:
        known = b""
    if len(known) != hashlib.sha256().digest_size:
        raise ValueError("a line of the key file begins with sha256: and holds no SHA-256 in hex")
    return known


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
