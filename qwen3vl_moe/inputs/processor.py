"""Chat messages or text, images and videos -> one :class:`Prompt`: token ids, pictures and M-RoPE positions.

A prompt is checked whole before any pixel is decoded: its form, the pairing of placeholders and images, and its length
in tokens, which the headers of the images already tell. A :class:`Processor` has no state that a call changes, so
any number of threads may share one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from qwen3vl_moe.config import Qwen3VLMoeConfig
from qwen3vl_moe.errors import ConfigError, PromptError
from qwen3vl_moe.inputs.access import MediaAccess
from qwen3vl_moe.inputs.chat_template import ChatTemplate, load_chat_template
from qwen3vl_moe.inputs.frames import Part
from qwen3vl_moe.inputs.image_source import check_alpha
from qwen3vl_moe.inputs.images import ImageSettings, Picture, copy_pixels, cut_patches
from qwen3vl_moe.inputs.media import MediaReader, Opened
from qwen3vl_moe.inputs.messages import MediaRequest, VideoRequest, split_media
from qwen3vl_moe.inputs.placeholders import check_place, find_placeholders, in_order
from qwen3vl_moe.inputs.prompt_forms import check_ids, split_prompt
from qwen3vl_moe.inputs.tokenizer import (
    VISION_TOKENS,
    begins_too_long,
    bytes_per_token,
    check_tokens,
    encode,
    is_longer,
    load_tokenizer,
)
from qwen3vl_moe.inputs.video import VideoSettings
from qwen3vl_moe.inputs.workers import side_by_side
from qwen3vl_moe.model.rope import mrope_positions
from qwen3vl_moe.ops.resize import resizes_like_pillow


@dataclass(frozen=True, eq=False)
class ImageInput:
    """One image of a prompt, or one group of a video's frames, which is an image to all that follows.

    Attributes:
        picture: its pixels on the CPU.
        start: index of its first placeholder token in the prompt.
        num_tokens: image tokens it takes, P / merge_size**2.
        of_video: whether it is of a video, which has a placeholder token of its own.
        part: of a video that is still being decoded: to be waited for before its pixels are read. None: they are there.
    """

    picture: Picture
    start: int
    num_tokens: int
    of_video: bool = False
    part: Part | None = None

    @property
    def grid_thw(self) -> tuple[int, int, int]:
        """Frames, rows, columns, counted in patches; their product is P."""
        return self.picture.grid

    @property
    def digest(self) -> bytes:
        """Of where its pixels come from, and its grid; those with the same digest are the same to the model."""
        return self.picture.digest

    @property
    def pixel_values(self) -> torch.Tensor:
        """Normalised patches, fp32 [P, patch_dim] on the CPU, made anew: what transformers' models take."""
        return cut_patches(copy_pixels([self.picture], "cpu"), [self.picture])


@dataclass(frozen=True, eq=False)
class Prompt:
    """One prompt of T tokens, ready for the engine.

    Attributes:
        text: the prompt as text, with one placeholder an image; None where token ids were given.
        token_ids: T ids, with a placeholder for every image token.
        positions_3T: M-RoPE positions, int64 [3, T] on the CPU; rows are time, height, width.
        next_position: position of the first generated token.
        images: and groups of frames, in order of appearance.
    """

    text: str | None
    token_ids: list[int]
    positions_3T: torch.Tensor
    next_position: int
    images: tuple[ImageInput, ...]


class Processor:
    """A checkpoint's tokenizer, chat template and image settings."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        chat_template: str | None,
        image_settings: ImageSettings,
        config: Qwen3VLMoeConfig,
        video_settings: VideoSettings | None = None,
        max_model_len: int | None = None,
        access: MediaAccess | None = None,
        alpha: str = "white",
        resize_on_device: bool = False,
    ):
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self._template = None if chat_template is None else ChatTemplate(chat_template, tokenizer.special_tokens_map)
        self.image_settings = image_settings
        self.video_settings = video_settings or VideoSettings(image_settings)
        self.config = config
        self.max_model_len = max_model_len
        self.access = access or MediaAccess()
        self.alpha = check_alpha(alpha)
        self.resize_on_device = resize_on_device and resizes_like_pillow()

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        config: Qwen3VLMoeConfig,
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        max_model_len: int | None = None,
        access: MediaAccess | None = None,
        alpha: str = "white",
        resize_on_device: bool = False,
    ) -> Processor:
        """Read tokenizer, chat template and image settings from a checkpoint directory.

        Args:
            directory: a local directory with tokenizer.json, preprocessor_config.json (or processor_config.json) and,
                for chat, a template: chat_template.jinja, chat_template.json or tokenizer_config.json's chat_template.
            config: of the model that the prompts are for; the files have to agree with it.
            min_pixels, max_pixels: bounds of the area (width x height, in pixels) that an image is resized to; None
                takes the checkpoint's.
            max_model_len: longest prompt in tokens, image tokens included; None for no limit.
            access: limits on the files and hosts that images are read from; None: no limits.
            alpha: what transparent images become: "white", on a white ground; "drop", the colours stored under the
                transparency, which is what transformers' processor sees.
            resize_on_device: for a model on a GPU: leave it the resize, unless a picture shrinks a lot.

        Raises:
            CheckpointError: the tokenizer is missing or damaged.
            ConfigError: the settings are missing, not supported, or not those of ``config``.
            OptionError: the pixel bounds leave no room, or ``alpha`` is not known.
        """
        directory = Path(directory)
        tokenizer = load_tokenizer(directory)
        settings = ImageSettings.from_pretrained(directory, min_pixels=min_pixels, max_pixels=max_pixels)
        _check_agreement(directory, tokenizer, settings, config)
        template = load_chat_template(directory)
        videos = VideoSettings.from_pretrained(directory, settings)
        return cls(tokenizer, template, settings, config, videos, max_model_len, access, alpha, resize_on_device)

    @property
    def eos_token_id(self) -> int | None:
        """The tokenizer's end-of-text token."""
        token = self.tokenizer.eos_token_id
        return token if isinstance(token, int) else None

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        """The conversation as the model reads it, with one placeholder an image or video; the arguments are those of
        :meth:`chat`.

        Raises:
            PromptError: the messages are malformed, there is no template, or it refuses them.
            OptionError: the flags contradict each other, or the template does not read one of the variables.
        """
        return self._render(messages, tools, chat_template_kwargs, add_generation_prompt, continue_final_message)[0]

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        keep_last: int | None = None,
        ahead: bool = False,
    ) -> Prompt:
        """The prompt that asks for the next answer in a conversation.

        Args:
            messages: see :func:`.messages.split_media` for their form.
            tools: JSON schemas of functions, or Python functions with type hints and a docstring.
            chat_template_kwargs: further variables of the template, such as ``add_vision_id`` or ``enable_thinking``.
            add_generation_prompt: end with the header of the assistant's next message.
            continue_final_message: end within the last message, which the answer goes on with; it has to be the
                assistant's, and ``add_generation_prompt`` has to be False.
            keep_last: at most so many of the prompt's last tokens are kept; None keeps all.
            ahead: return before the frames of video files are decoded: see :attr:`ImageInput.part`.

        Raises:
            PromptError: the conversation or one of its images cannot be used, or it is longer than ``max_model_len``.
            OptionError: the flags contradict each other, or the template does not read one of the variables.
        """
        text, media = self._render(messages, tools, chat_template_kwargs, add_generation_prompt, continue_final_message)
        return self._build(text, self._encode(text), media, self.image_settings, keep_last=keep_last, ahead=ahead)

    def prompt(
        self, prompt: str | Sequence[int] | Mapping[str, Any], *, keep_last: int | None = None, ahead: bool = False
    ) -> Prompt:
        """A prompt without a chat template.

        Args:
            prompt: text, token ids, or ``{"prompt": text}`` / ``{"prompt_token_ids": ids}`` with
                ``"multi_modal_data": {"image": source or list of sources, "video": alike}``. Each image has its
                placeholder ``<|vision_start|><|image_pad|><|vision_end|>``, a video ``<|video_pad|>`` in the middle;
                in token ids that may also be all tokens that it becomes, so that the ids of an earlier prompt can be
                given again.
                ``"text_token_ids": ids``, beside these or alone, are tokens that follow and that are text whatever
                they spell: an answer that is fed back, where an image's placeholder stands for no image.
                ``"mm_processor_kwargs"`` bounds this prompt's images (min_pixels and max_pixels, or size), and says
                what its videos ask for: fps, num_frames, or ``videos_kwargs`` with ``video.VIDEO_KEYS``.
            keep_last: at most so many of the prompt's last tokens are kept; None keeps all.
            ahead: as in :meth:`chat`.

        Raises:
            PromptError: the prompt or one of its images cannot be used, or it is longer than ``max_model_len``.
        """
        parts = split_prompt(prompt)
        if keep_last is not None and not parts.media:
            parts = parts.last(keep_last)
        settings, text_ids = parts.settings(self.image_settings), self._check_ids(parts.text_ids)
        if isinstance(parts.body, str):
            return self._build(parts.body, self._encode(parts.body), parts.media, settings, text_ids, keep_last, ahead)
        return self._build(None, self._check_ids(parts.body), parts.media, settings, text_ids, keep_last, ahead)

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None,
        variables: Mapping[str, Any] | None,
        add_generation_prompt: bool,
        continue_final_message: bool,
    ) -> tuple[str, list[MediaRequest]]:
        if self._template is None:
            raise PromptError(
                "the checkpoint has no chat template (chat_template.jinja, chat_template.json or chat_template in "
                "tokenizer_config.json); give a text prompt instead"
            )
        plain, media = split_media(messages, VISION_TOKENS, self._template.names)
        text = self._template.render(
            plain,
            VISION_TOKENS,
            tools=tools,
            variables=variables,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
        return text, media

    @cached_property
    def _bytes_per_token(self) -> int | None:
        return bytes_per_token(self.tokenizer)

    def _encode(self, text: str) -> list[int]:
        limit = self.max_model_len
        # Making tokens takes 250 times the memory of the text: one that cannot fit is refused before, by its bytes or,
        # where tokens may be long, by its beginning.
        if limit is not None and 4 * len(text) > limit:  # else it has not even as many bytes
            most, tokenizer = self._bytes_per_token, self.tokenizer
            if (most and is_longer(tokenizer, text, most * limit)) or begins_too_long(tokenizer, text, limit):
                raise PromptError(
                    f"the prompt has {len(text)} characters, which are more tokens than max_model_len={limit}; "
                    "shorten it or raise max_model_len"
                )
        return encode(self.tokenizer, text)

    def _check_ids(self, ids: Any) -> list[int]:
        if self.max_model_len is not None and isinstance(ids, Sized) and len(ids) > self.max_model_len:
            raise PromptError(self._too_long(len(ids)))
        return check_ids(ids, self.config.text.vocab_size)

    def _build(
        self,
        text: str | None,
        ids: list[int],
        requests: list[MediaRequest],
        settings: ImageSettings,
        text_ids: Sequence[int] = (),
        keep_last: int | None = None,
        ahead: bool = False,
    ) -> Prompt:
        if keep_last is not None and not requests:
            ids = ids[max(0, len(ids) + len(text_ids) - keep_last) :]
        if not ids and not text_ids:
            raise PromptError("the prompt is empty: at least one token is needed")
        places = find_placeholders(ids, self.config)
        requests = in_order(places, requests)
        reader = MediaReader(
            self.config, self.tokenizer, settings, self.video_settings, self.access, self.alpha, self.resize_on_device
        )
        text_tokens = len(ids) + len(text_ids) - sum(place.stop - place.start for place in places)
        self._check_least(text_tokens, requests, reader)
        media = reader.open(requests)
        for place, each in zip(places, media, strict=True):
            check_place(ids, place, each)
        total = text_tokens + sum(len(each.ids) for each in media)
        if keep_last is not None and total > keep_last:
            raise PromptError(
                f"truncate_prompt_tokens={keep_last} would cut a prompt with images, which has {total} tokens"
            )
        self._check_length(text_tokens, media, settings)
        decoded = side_by_side(lambda each: each.pictures(ahead), media)

        token_ids: list[int] = []
        images: list[ImageInput] = []
        done = 0
        for place, each, pictures in zip(places, media, decoded, strict=True):
            token_ids += ids[done : place.start]
            for begin, picture, part in pictures:
                count = settings.num_tokens(picture.grid)
                images.append(ImageInput(picture, len(token_ids) + begin, count, place.is_video, part))
            token_ids += each.ids
            done = place.stop
        token_ids += ids[done:]
        grids = {
            self.config.image_token_id: [image.grid_thw for image in images if not image.of_video],
            self.config.video_token_id: [image.grid_thw for image in images if image.of_video],
        }
        # Text, whatever its ids spell, stands here as -1, which is no placeholder.
        positions_3T, next_position = mrope_positions(
            token_ids + [-1] * len(text_ids), grids, self.image_settings.merge_size
        )
        if text_ids:
            text, token_ids = None, [*token_ids, *text_ids]
        return Prompt(text, token_ids, positions_3T, next_position, tuple(images))

    def _too_long(self, total: int) -> str:
        return (
            f"the prompt has {total} tokens, more than max_model_len={self.max_model_len}; "
            "shorten it or raise max_model_len"
        )

    def _check_least(self, text_tokens: int, requests: list[MediaRequest], reader: MediaReader) -> None:
        """Refuse what is too long whatever its images turn out to be, before the first of them is fetched."""
        of_images = sum(reader.least_tokens(each, i) for i, each in enumerate(requests))
        total, limit = text_tokens + of_images, self.max_model_len
        if requests and limit is not None and total > limit:
            raise PromptError(
                f"the prompt has at least {total} tokens, more than max_model_len={limit}: {text_tokens} of text and "
                f"at least {of_images} of {_counted(requests)}; "
                f"{'give fewer images' if text_tokens < limit else 'shorten the text'} or raise max_model_len"
            )

    def _check_length(self, text_tokens: int, media: list[Opened], settings: ImageSettings) -> None:
        total, limit = text_tokens + sum(len(each.ids) for each in media), self.max_model_len
        if limit is None or total <= limit:
            return
        if not media:
            raise PromptError(self._too_long(total))
        largest = max(media, key=lambda each: len(each.ids))
        way_out = f"lower max_pixels (now {settings.max_pixels})"
        if largest.frames:
            room = limit - total + len(largest.ids)
            way_out = f"beside the rest {largest.room(room)}: ask for less"
        if text_tokens >= limit:
            way_out = "shorten the text"
        raise PromptError(
            f"the prompt has {total} tokens, more than max_model_len={limit}: {text_tokens} of text and "
            f"{total - text_tokens} of {_counted(media)}, the largest being {largest.where} of {largest.size_text} "
            f"with {largest.num_tokens} image tokens; {way_out} or raise max_model_len"
        )


def _counted(media: Sequence[MediaRequest | Opened]) -> str:
    videos = sum(bool(each.frames) if isinstance(each, Opened) else isinstance(each, VideoRequest) for each in media)
    counts = (len(media) - videos, "image(s)"), (videos, "video(s)")
    return " and ".join(f"{count} {kind}" for count, kind in counts if count)


def _check_agreement(
    directory: Path, tokenizer: PreTrainedTokenizerFast, settings: ImageSettings, config: Qwen3VLMoeConfig
) -> None:
    for name in ("patch_size", "temporal_patch_size", "merge_size"):
        ours, model = getattr(settings, name), getattr(config.vision, name)
        if ours != model:
            raise ConfigError(
                f"{directory}: the image settings have {name} {ours}, the model's config.json has {model}"
            )
    check_tokens(directory, tokenizer, config)
