"""Tokens to text while they arrive: never half a character, never a part of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from itertools import compress


class TokenBytes:
    """The bytes of each token of a byte-level BPE vocabulary.

    Such a tokenizer spells a byte as one character: printable ones as themselves, the rest from U+0100 on (GPT-2's
    table). Going back to bytes makes decoding exact at any cut, which joining decoded pieces is not.

    Attributes:
        special: ids of the tokens that a text leaves out, {id: how it is spelled}.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        # Special tokens that have no named role (Qwen's vision markers) are listed only among the added tokens.
        added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        ids = sorted({i for i in tokenizer.all_special_ids if i is not None} | added)  # a role may name no token
        self.special: dict[int, str] = dict(zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True))
        self._known: dict[int, bytes] = {}
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = (byte for byte in range(256) if byte not in printable)
        self._byte = {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}

    def __call__(self, token_id: int) -> bytes:
        """Bytes of one token; none for special tokens and for ids that the vocabulary leaves unused."""
        if token_id not in self._known:
            piece = None if token_id in self.special else self.tokenizer.convert_ids_to_tokens(token_id)
            if piece is None:
                raw = b""
            elif all(character in self._byte for character in piece):
                raw = bytes(self._byte[character] for character in piece)
            else:  # an added token is spelled as plain text
                raw = piece.encode()
            self._known[token_id] = raw
        return self._known[token_id]

    def decoded(self, token_id: int, before: Sequence[int]) -> str:
        """The text of one token by itself: of a character's last token the character, of those before it nothing.

        Args:
            before: the tokens that it follows.
        """
        if token_id in self.special:
            return self.special[token_id]
        raw = self(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:  # it begins within a character, or ends there
            return codecs.getincrementaldecoder("utf-8")("replace").decode(self._begun(before) + raw)

    def _begun(self, tokens: Sequence[int]) -> bytes:
        """The bytes at the end of ``tokens`` that begin a character and do not complete it."""
        tail, at = b"", len(tokens)
        while at and len(tail) < 3:  # a character has at most four bytes
            at -= 1
            tail = self(tokens[at]) + tail
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(tail)
        return decoder.getstate()[0]


class TextStream:
    """The text of one answer, released piece by piece.

    Bytes wait until they complete a character; characters wait while they could be the beginning of a stop string.

    Args:
        token_bytes: of the vocabulary; None: the text stays empty.
        stop: texts that end the answer. If one of them spells a special token, all are looked for in the text as it is
            with its special tokens, though these are left out of what is released.
        include_stop: whether the text ends with the stop string rather than before it.
        skip_special: whether special tokens are left out.
    """

    def __init__(
        self,
        token_bytes: TokenBytes | None,
        stop: tuple[str, ...] = (),
        include_stop: bool = False,
        skip_special: bool = True,
    ):
        self._token_bytes, self._stop, self._include_stop = token_bytes, stop, include_stop
        special = token_bytes.special if token_bytes is not None and (stop or not skip_special) else {}
        watched = any(spelling in text for spelling in special.values() for text in stop)
        self._spelled = special if watched or not skip_special else {}
        self._skip_special = skip_special
        self.clear()

    def clear(self) -> None:
        """Begin again."""
        self.text, self._decoder = "", codecs.getincrementaldecoder("utf-8")(errors="replace")
        # Characters that wait, whether each is text, and how many at their beginning were too early to end a stop.
        self._held = ""
        self._is_text: list[bool] = []
        self._settled = 0

    @property
    def watches(self) -> bool:
        """Whether there are stop strings, so that every token has to be pushed as it comes."""
        return self._token_bytes is not None and bool(self._stop)

    def extend(self, token_ids: Sequence[int]) -> None:
        """Take several tokens, where there are no stop strings."""
        if self._token_bytes is None:
            return
        if self._spelled:
            for token_id in token_ids:
                self.push(token_id)
        else:
            self.text += self._decoder.decode(b"".join(map(self._token_bytes, token_ids)))

    def push(self, token_id: int, may_stop: bool = True) -> str | None:
        """Take one token; return the stop string that it completes, if any (the text then ends before it).

        Args:
            token_id: the next one.
            may_stop: whether a stop string may end with it.
        """
        if self._token_bytes is None:
            return None
        if token_id in self._spelled:
            piece = self._spelled[token_id]
            is_text = not self._skip_special
            piece = self._decoder.decode(b"", final=True) + piece if is_text else piece
        else:
            piece, is_text = self._decoder.decode(self._token_bytes(token_id)), True
        if not self._stop:
            self.text += piece
            return None
        window = self._held + piece
        self._is_text += [is_text] * len(piece)
        if not may_stop:
            self._settled = len(window)
        found = [(at, stop) for stop in self._stop if (at := self._find(window, stop)) >= 0]
        if found:
            position, stop = min(found)
            self._release(window, position + (len(stop) if self._include_stop else 0))
            self._held, self._is_text = "", []
            self._decoder.reset()  # what follows the stop in its token is no part of the text
            return stop
        self._release(window, len(window) - _partial_stop(window, self._stop))
        return None

    def flush(self) -> None:
        """The answer ended otherwise: release what waits. Bytes that complete no character become U+FFFD."""
        self._release(self._held, len(self._held))
        self.text += self._decoder.decode(b"", final=True)

    def _find(self, window: str, stop: str) -> int:
        """Where a stop string begins that ends behind the characters that were too early; -1 if there is none."""
        return window.find(stop, max(0, self._settled - len(stop) + 1))

    def _release(self, window: str, count: int) -> None:
        """The first characters of the window become text, the others wait."""
        self.text += "".join(compress(window[:count], self._is_text))
        self._held, self._is_text = window[count:], self._is_text[count:]
        self._settled = max(0, self._settled - count)


def _partial_stop(text: str, stops: tuple[str, ...]) -> int:
    """Length of the longest end of ``text`` that begins a stop string."""
    longest = max((len(stop) - 1 for stop in stops), default=0)
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0
