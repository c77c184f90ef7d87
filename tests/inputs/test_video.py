"""Videos against transformers: which frames, of what size, in which patches, and what the prompt says of them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor, smart_resize
from transformers.video_utils import VideoMetadata

from qwen3vl_moe.errors import PromptError
from qwen3vl_moe.inputs.images import ImageSettings
from qwen3vl_moe.inputs.tokenizer import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER
from qwen3vl_moe.inputs.video import VideoOptions, VideoSettings
from tests.inputs import parts
from tests.inputs.video_oracle import clip, oracle_for, with_torchvision


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return parts.make(tmp_path_factory.mktemp("processor"))


@pytest.fixture
def oracle(processor, monkeypatch):
    with_torchvision(monkeypatch)
    return oracle_for(processor)


def settings_of(**options) -> VideoSettings:
    image = ImageSettings(16, 2, 2, 65536, 16777216, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    return VideoSettings(image, **options)


def ours_and_theirs(processor, oracle, text, videos, metadata=None, images=None, **sampling):
    """Our prompt, and the oracle's tensors."""
    beside = metadata or [{"fps": 24}] * len(videos)  # what transformers assumes
    data = {"video": list(zip(videos, beside, strict=True))}
    if images:
        data["image"] = images
    prompt = processor.prompt({"prompt": text, "multi_modal_data": data, "mm_processor_kwargs": sampling})
    if metadata:
        metadata = [
            {"total_num_frames": len(video), "frames_indices": list(range(len(video))), **each}
            for video, each in zip(videos, metadata, strict=True)
        ]
    if "num_frames" in sampling:
        sampling["fps"] = None
    theirs = oracle(
        text=[text],
        videos=videos,
        images=images,
        video_metadata=metadata,
        do_sample_frames=bool(sampling),
        return_tensors="pt",
        **sampling,
    )
    return prompt, theirs


def assert_equal(prompt, theirs):
    assert prompt.token_ids == theirs["input_ids"][0].tolist()
    frames = [image for image in prompt.images if image.of_video]
    assert sum(len(image.pixel_values) for image in frames) == len(theirs["pixel_values_videos"])
    # Theirs are normalised in one step, which rounds otherwise; a pixel that differed would differ by 8e-3.
    torch.testing.assert_close(
        torch.cat([image.pixel_values for image in frames]), theirs["pixel_values_videos"], rtol=0, atol=1e-6
    )
    for image in prompt.images:
        token = prompt.token_ids[image.start]
        assert prompt.token_ids[image.start : image.start + image.num_tokens] == [token] * image.num_tokens
        assert prompt.token_ids[image.start + image.num_tokens] != token
    grids = [image.grid_thw[1:] for image in frames]
    assert grids == [(h, w) for t, h, w in theirs["video_grid_thw"].tolist() for _ in range(t)]


CASES = {
    "one video": ([(6, 40, 24)], {}),
    "an odd number of frames": ([(5, 40, 24)], {}),
    "other fps": ([(30, 24, 40)], {"fps": 4}),
    "a number of frames": ([(30, 24, 40)], {"num_frames": 7}),
    "as large as it comes out": ([(4, 64, 32)], {}),
    "small frames grow": ([(3, 9, 5)], {}),
    "two videos": ([(4, 21, 67), (7, 50, 30)], {}),
}


@pytest.mark.parametrize("metadata", [None, {"fps": 3.7}])
@pytest.mark.parametrize("case", list(CASES))
def test_prompts_equal_transformers(processor, oracle, case, metadata):
    sizes, options = CASES[case]
    videos = [clip(*size, seed) for seed, size in enumerate(sizes)]
    text = "See " + " and ".join([VIDEO_PLACEHOLDER] * len(sizes)) + "!"
    listed = None if metadata is None else [metadata] * len(sizes)
    assert_equal(*ours_and_theirs(processor, oracle, text, videos, listed, **options))


def test_indices_tell_the_times_of_frames_that_were_chosen_before(processor, oracle):
    listed = [{"fps": 30, "frames_indices": [3, 18, 34, 90, 91]}]
    prompt, theirs = ours_and_theirs(processor, oracle, VIDEO_PLACEHOLDER, [clip(5, 40, 24)], listed)
    assert_equal(prompt, theirs)
    words = processor.tokenizer.decode(prompt.token_ids)
    assert all(f"<{time} seconds>" in words for time in ("0.3", "2.1", "3.0"))


def test_videos_and_an_image(processor, oracle):
    text = f"{VIDEO_PLACEHOLDER}a{IMAGE_PLACEHOLDER}{VIDEO_PLACEHOLDER}"
    videos, images = [clip(4, 40, 24), clip(2, 24, 24)], [parts.picture(30, 20)]
    prompt, theirs = ours_and_theirs(processor, oracle, text, videos, images=images)
    assert_equal(prompt, theirs)
    assert [image.of_video for image in prompt.images] == [True, True, False, True]


def test_one_frame_is_as_if_it_were_there_twice(processor, oracle):
    """transformers refuses it."""
    frame = clip(1, 40, 24)
    prompt = processor.prompt({"prompt": VIDEO_PLACEHOLDER, "multi_modal_data": {"video": (frame, {"fps": 24})}})
    with pytest.raises(ValueError, match="t:1 must be larger"):
        oracle(text=[VIDEO_PLACEHOLDER], videos=[frame], do_sample_frames=False)
    twice = [{"fps": 24, "frames_indices": [0, 0]}]
    _, theirs = ours_and_theirs(processor, oracle, VIDEO_PLACEHOLDER, [np.repeat(frame, 2, axis=0)], twice)
    assert_equal(prompt, theirs)


@pytest.mark.filterwarnings("error:The given NumPy array")
def test_messages_equal_transformers(processor, oracle):
    """A list of pictures, an array, and a list of files are one video; in messages as in prompts."""
    frames = clip(4, 40, 24)
    pictures, question = list(map(Image.fromarray, frames)), {"type": "text", "text": "Hm?"}
    prompt = processor.chat([{"role": "user", "content": [{"type": "video", "video": pictures, "fps": 2}, question]}])
    plain = [{"role": "user", "content": [{"type": "video"}, question]}]
    text = oracle.apply_chat_template(plain, add_generation_prompt=True)
    listed = [{"fps": 2.0, "total_num_frames": 4, "frames_indices": [0, 1, 2, 3]}]
    theirs = oracle(text=[text], videos=[frames], video_metadata=listed, do_sample_frames=False, return_tensors="pt")
    assert_equal(prompt, theirs)
    for source in (frames, torch.from_numpy(frames).permute(0, 3, 1, 2), list(map(parts.png, pictures))):
        again = processor.chat([{"role": "user", "content": [{"video": source, "sample_fps": "2"}, question]}])
        assert again.token_ids == prompt.token_ids
        assert [i.digest for i in again.images] == [i.digest for i in prompt.images]


@pytest.mark.parametrize("fps", [None, 3.0, 10, 23.976, 60])
@pytest.mark.parametrize("total", [1, 2, 3, 7, 48, 100, 1441, 100_000])
@pytest.mark.parametrize("asked", [{}, {"fps": 0.5}, {"fps": 30.0}, {"num_frames": 5}, {"fps": 2.0, "max_frames": 9}])
def test_sampling_equals_transformers(total, fps, asked, monkeypatch):
    with_torchvision(monkeypatch)
    if asked.get("num_frames", 0) > total:
        pytest.skip("there, transformers takes frames twice")
    ours = settings_of().sample(total, fps, VideoOptions.of(asked, "x"))
    options = {key: value for key, value in asked.items() if key != "max_frames"}
    oracle = Qwen3VLVideoProcessor(**({"max_frames": 9} if "max_frames" in asked else {}))
    theirs = oracle.sample_frames(VideoMetadata(total, fps=fps), **options)
    assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize("cap", [None, 768])
@pytest.mark.parametrize("bounds", [(131072, 786432), (4096, 25165824), (65536, 16777216)])
def test_sizes_equal_transformers(bounds, cap):
    settings = settings_of(min_pixels=bounds[0], max_pixels=bounds[1], frame_tokens=cap)
    for frames in (2, 3, 4, 5, 8, 64, 255, 768):
        for height, width in ((360, 640), (720, 1280), (1080, 1920), (31, 700), (5, 9), (640, 360), (48, 48)):
            high = bounds[1]
            if cap is not None:  # as in transformers' resize()
                high = max(min(cap * 1024, bounds[1] // frames), int(bounds[0] * 1.05)) * frames
            theirs = smart_resize(frames, height, width, 2, 32, bounds[0], high)
            grid = settings.grid(frames, height, width, VideoOptions(), "x")
            assert grid == (-(-frames // 2), theirs[0] // 16, theirs[1] // 16)


def test_what_a_video_asks_for():
    settings = settings_of(min_pixels=4096, max_pixels=25165824)

    def area(**options):
        _, rows, columns = settings.grid(8, 720, 1280, VideoOptions.of(options, "x"), "x")
        return rows * columns * 256

    assert area() == 704 * 1280
    assert area(max_pixels=100_000) <= 100_000 < area(max_pixels=200_000)
    assert area(total_pixels=800_000) * 8 <= 800_000
    assert area(min_pixels=2_000_000) >= 2_000_000
    assert area(resized_height=64, resized_width=100) == 64 * 96
    with pytest.raises(PromptError, match="at least 24000000 pixels together and at most 8000000"):
        area(min_pixels=3_000_000, max_pixels=1_000_000)


@pytest.mark.filterwarnings("ignore:.*frames a second are assumed")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fps": 0}, "fps 0; a number of frames a second"),
        ({"fps": True}, "fps True"),
        ({"fps": 1e-300}, "fps 1e-300"),
        ({"fps": "fast"}, "fps 'fast'"),
        ({"fps": float("nan")}, "fps nan"),
        ({"num_frames": 1.5}, "num_frames 1.5"),
        ({"num_frames": 10**6}, "num_frames 1000000"),
        ({"num_frames": 4, "fps": 2}, "num_frames and fps; one of them"),
        ({"min_pixels": -1}, "min_pixels -1"),
        ({"resized_height": 64}, "go together"),
        ({"sample_fps": 1, "fps": 2}, "sample_fps beside fps"),
        ({"video_metadata": 3}, "video_metadata of type int"),
        ({"video_metadata": {"frames": 3}}, "the key 'frames'; fps, frames_indices"),
        ({"video_metadata": {"frames_indices": [0.5]}}, "a list of whole numbers"),
        ({"video_metadata": {"fps": 1, "frames_indices": [0, 1]}}, "has 3 frames and 2 frames_indices"),
        ({"video_metadata": {"fps": 1, "frames_indices": [0, 1, 2]}, "num_frames": 2}, "is chosen already"),
        ({"max_pixels": 10}, "at least"),
        ({"nframes": 4}, "has the key 'nframes'"),
    ],
)
def test_options_are_refused_by_name(processor, options, message):
    item = {"type": "video", "video": clip(3, 40, 24), **options}
    if message == "at least":
        item["min_pixels"] = 1000
    with pytest.raises(PromptError, match=message) as caught:
        processor.chat([{"role": "user", "content": [item]}])
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:.*frames a second are assumed")
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], r"video 0 \(0 frames\) has 0 frames"),
        (np.zeros((3, 8, 8, 3), np.float32), "array of float32"),
        (np.zeros((3, 8, 8), np.uint8), r"array of uint8 \[3, 8, 8\]"),
        (np.zeros((0, 8, 8, 3), np.uint8), "array of uint8"),
        ([parts.picture(8, 8), parts.picture(8, 9)], "frame 1 is 8x9 pixels, frame 0 is 8x8"),
        ([parts.picture(8, 8), b"x"], r"video 0 \(2 frames\): frame 1 \(1 bytes\) is not an image"),
        ([parts.picture(8, 8), None], "frame 1 .NoneType. is of a type that is not understood"),
        (np.zeros((2, 8, 1700, 3), np.uint8), "factor of 200"),
        (7, r"video 0 \(int\) is of a type"),
        (b"", "video 0 .0 bytes. is empty"),
        ("missing.mp4", "there is no such file"),
    ],
)
def test_sources_are_refused(processor, source, message):
    with pytest.raises(PromptError, match=message) as caught:
        processor.chat([{"role": "user", "content": [{"type": "video", "video": source}]}])
    assert "\n" not in str(caught.value)


def test_an_assumed_fps_is_told(processor):
    with pytest.warns(UserWarning, match="24 frames a second are assumed"):
        processor.chat([{"role": "user", "content": [{"type": "video", "video": clip(2, 8, 8)}]}])


def test_ids_of_an_earlier_prompt_may_be_given_again(processor):
    data = {"video": [(clip(5, 40, 24), {"fps": 2})], "image": [parts.picture(20, 20)]}
    text = f"a{IMAGE_PLACEHOLDER}b{VIDEO_PLACEHOLDER}c"
    prompt = processor.prompt({"prompt": text, "multi_modal_data": data})
    again = processor.prompt({"prompt_token_ids": prompt.token_ids, "multi_modal_data": data})
    assert again.token_ids == prompt.token_ids
    assert torch.equal(again.positions_3T, prompt.positions_3T)
    other = {**data, "video": [(clip(5, 40, 24), {"fps": 1})]}
    with pytest.raises(PromptError, match="is spelled out in the prompt in other tokens than its own"):
        processor.prompt({"prompt_token_ids": prompt.token_ids, "multi_modal_data": other})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<|video_pad|>", "the <|video_pad|> at token 0 does not stand alone"),
        ("<|vision_start|><|video_pad|><|video_pad|><|vision_end|>", "stands 2 times; write one"),
        ("<|vision_start|>a<|vision_start|><|video_pad|>", "is not followed by"),
        ("<|vision_start|>a<|vision_start|><|video_pad|><|vision_end|>", "is not followed by"),
        ("<|vision_start|>a<|vision_start|><|image_pad|><|vision_end|><|vision_end|>", "is not followed by"),
        (VIDEO_PLACEHOLDER * 2, "2 video placeholders .* for 1 videos"),
        (IMAGE_PLACEHOLDER + VIDEO_PLACEHOLDER, "1 image placeholders .* for 0 images"),
    ],
)
def test_placeholders(processor, text, message):
    message = message.replace("<|", r"<\|").replace("|>", r"\|>")
    with pytest.raises(PromptError, match=message):
        processor.prompt({"prompt": text, "multi_modal_data": {"video": [(clip(2, 8, 8), {"fps": 2})]}})


def test_too_long_a_video_is_refused_before_a_frame_is_decoded_and_told_what_fits(tmp_path, monkeypatch):
    settings = {"size": {"shortest_edge": 4096, "longest_edge": 10**6}}
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(settings))
    processor = parts.make(tmp_path, max_model_len=400)
    assert processor.video_settings.max_pixels == 10**6
    monkeypatch.setattr("qwen3vl_moe.inputs.frame_list.decoded", lambda *_: pytest.fail("a frame was decoded"))
    frames = [parts.picture(64, 64)] * 20
    item = {"type": "video", "video": frames, "fps": 2}
    with pytest.raises(PromptError, match="20 frames of 64x64 pixels with 640 image tokens; beside") as caught:
        processor.chat([{"role": "user", "content": [item]}])
    monkeypatch.undo()
    words = str(caught.value)
    most = int(words.split("there is room for ")[1].split()[0])
    area = int(words.split("of at most ")[1].split()[0])
    for options, fits in (
        ({"num_frames": most}, True),
        ({"num_frames": most + 2}, False),
        ({"max_pixels": area}, True),
    ):
        again = {**item, **options}
        if "num_frames" in options:
            del again["fps"]
            again["video_metadata"] = {"fps": 2}
        conversation = [{"role": "user", "content": [again]}]
        if fits:
            assert len(processor.chat(conversation).token_ids) <= 400
        else:
            with pytest.raises(PromptError, match="more than max_model_len=400"):
                processor.chat(conversation)
