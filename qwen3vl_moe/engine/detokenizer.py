"""Tokens to text while they arrive: never half a character, never a part of a stop string."""

from __future__ import annotations

import codecs


class TokenBytes:
    """The bytes of each token of a byte-level BPE vocabulary.

    Such a tokenizer spells a byte as one character: printable ones as themselves, the rest from U+0100 on (GPT-2's
    table). Going back to bytes makes decoding exact at any cut, which joining decoded pieces is not.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids) | _special_added(tokenizer)
        self._known: dict[int, bytes] = {}
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = (byte for byte in range(256) if byte not in printable)
        self._byte = {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}

    def __call__(self, token_id: int) -> bytes:
        """Bytes of one token; none for special tokens and for ids that the vocabulary leaves unused."""
        if token_id not in self._known:
            piece = None if token_id in self._special else self.tokenizer.convert_ids_to_tokens(token_id)
            if piece is None:
                raw = b""
            elif all(character in self._byte for character in piece):
                raw = bytes(self._byte[character] for character in piece)
            else:  # an added token is spelled as plain text
                raw = piece.encode()
            self._known[token_id] = raw
        return self._known[token_id]


def _special_added(tokenizer) -> frozenset[int]:
    """Special tokens that have no named role (Qwen's vision markers) are listed only among the added tokens."""
    return frozenset(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)


class TextStream:
    """The text of one answer, released piece by piece.

    Bytes wait until they complete a character; characters wait while they could be the beginning of a stop string.
    """

    def __init__(self, token_bytes: TokenBytes, stop: tuple[str, ...] = ()):
        self.text = ""
        self._token_bytes, self._stop = token_bytes, stop
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def push(self, token_id: int) -> str | None:
        """Take one token; return the stop string that it completes, if any (the text then ends before it)."""
        window = self._held + self._decoder.decode(self._token_bytes(token_id))
        found = [(window.index(stop), stop) for stop in self._stop if stop in window]
        if found:
            position, stop = min(found)
            self.text += window[:position]
            self._held = ""
            return stop
        held = _partial_stop(window, self._stop)
        self.text += window[: len(window) - held]
        self._held = window[len(window) - held :]
        return None

    def flush(self) -> None:
        """The answer ended otherwise: release what waits. Bytes that complete no character become U+FFFD."""
        self.text += self._held + self._decoder.decode(b"", final=True)
        self._held = ""


def _partial_stop(text: str, stops: tuple[str, ...]) -> int:
    """Length of the longest end of ``text`` that begins a stop string."""
    longest = max((len(stop) - 1 for stop in stops), default=0)
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0
