"""Video files: the frames of PyAV's own reader, whatever is asked for, and refusals of what is none."""

import base64
import gc
import io
import os
import sys
import threading

import numpy as np
import pytest
from transformers.video_utils import read_video_pyav

from qwen3vl_moe.errors import OptionError, PromptError
from qwen3vl_moe.inputs import fetch, video_file
from qwen3vl_moe.inputs.file_kinds import missing_bytes
from qwen3vl_moe.inputs.tokenizer import VIDEO_PLACEHOLDER
from qwen3vl_moe.inputs.video_file import open_video_file
from tests.inputs import parts
from tests.inputs.clips import make_clip, plain_frames
from tests.inputs.test_video import assert_equal
from tests.inputs.video_oracle import oracle_for, with_torchvision

pytest.importorskip("av", reason="videos need PyAV")

UNEVEN = list(np.cumsum([0, *(20 + 37 * n % 160 for n in range(39))]))
CLIPS = {
    "H.264 with B-frames": {},
    "H.264, open groups": {"options": {"x264-params": "open-gop=1:bframes=3:scenecut=0"}},
    "H.264, 10 bits": {"pix_fmt": "yuv420p10le"},
    "H.264 with uneven times": {"times_ms": UNEVEN},
    "HEVC, 10 bits": {"container": "matroska", "codec": "libx265", "pix_fmt": "yuv420p10le"},
    "VP9": {"container": "webm", "codec": "libvpx-vp9"},
    "AV1": {"codec": "libsvtav1"},
    "MPEG-4 in AVI": {"container": "avi", "codec": "mpeg4"},
    "transport stream": {"container": "mpegts"},
    "Flash": {"container": "flv", "codec": "flv"},
    "one key frame": {"key_every": 1000},
    "only key frames": {"codec": "mjpeg", "pix_fmt": "yuvj420p", "container": "mov", "key_every": 1},
    "odd sides": {"size": (66, 50)},
    "with alpha": {"container": "mov", "codec": "qtrle", "pix_fmt": "argb"},
    "GIF": {"container": "gif", "codec": "gif", "pix_fmt": "rgb8"},
}


def frames_of(video, indices):
    found = {}
    video.read(indices, lambda place, frame: found.__setitem__(place, frame))
    assert sorted(found) == list(range(len(indices)))
    return [found[place] for place in range(len(indices))]


@pytest.mark.parametrize("case", list(CLIPS))
def test_frames_are_those_of_the_plain_reader(case):
    data = make_clip(**CLIPS[case])
    every = plain_frames(data)
    video = open_video_file(data, "video 0", "drop")
    assert (video.total, video.height, video.width) == (len(every), *every[0].shape[:2])
    for indices in ([0], [len(every) - 1], [5, 13, 23, 24, 39], range(len(every))):
        for ours, index in zip(frames_of(video, indices), indices, strict=True):
            np.testing.assert_array_equal(ours, every[index])


@pytest.mark.parametrize("case", ["H.264 with B-frames", "H.264 with uneven times", "AV1", "MPEG-4 in AVI"])
def test_files_become_the_prompts_of_transformers(tmp_path, monkeypatch, case):
    """Its PyAV reader chooses frames by the same rule and reads the same fps, also where times are uneven."""
    with_torchvision(monkeypatch)
    (tmp_path / "clip").write_bytes(make_clip(**CLIPS[case]))
    processor = parts.make(tmp_path)
    oracle = oracle_for(processor)
    sample = oracle.video_processor.sample_frames
    frames, metadata = read_video_pyav(str(tmp_path / "clip"), lambda metadata, **_: sample(metadata, fps=5))
    listed = [{**metadata, "fps": float(metadata.fps)}]
    options = {"do_sample_frames": False, "return_tensors": "pt"}
    theirs = oracle(text=[VIDEO_PLACEHOLDER], videos=[frames], video_metadata=listed, **options)
    data = {"video": str(tmp_path / "clip")}
    prompt = processor.prompt(
        {"prompt": VIDEO_PLACEHOLDER, "multi_modal_data": data, "mm_processor_kwargs": {"fps": 5}}
    )
    assert_equal(prompt, theirs)


@pytest.mark.parametrize("degrees", [90, 180, -90])
def test_turned_clips_are_set_upright(degrees):
    """As players show them; PyAV's reader, and so transformers', leaves them as they are stored."""
    data = make_clip(rotation=degrees)
    stored = plain_frames(data)
    video = open_video_file(data, "video 0", "white")
    assert (video.height, video.width) == ((48, 64) if degrees == 180 else (64, 48))
    for ours, index in zip(frames_of(video, [0, 30]), [0, 30], strict=True):
        np.testing.assert_array_equal(ours, np.rot90(stored[index], degrees // 90))


def test_other_angles_are_refused():
    with pytest.raises(PromptError, match=r"to be turned by -?(29|30) degrees"):
        open_video_file(make_clip(rotation=30), "video 0", "white")


@pytest.mark.parametrize(
    "clip", [CLIPS["with alpha"], {"container": "webm", "codec": "libvpx-vp9", "pix_fmt": "yuva420p"}]
)
def test_what_is_transparent_becomes_white(clip):
    data = make_clip(**clip, frames=4)
    white = frames_of(open_video_file(data, "video 0", "white"), [0])[0][14, 6].astype(int)
    drop = frames_of(open_video_file(data, "video 0", "drop"), [0])[0][14, 6].astype(int)
    expected = (drop * 90 + 255 * (255 - 90)) / 255  # as drawn
    assert np.abs(white - expected).max() <= 6


def test_only_what_is_needed_is_decoded(monkeypatch):
    """Two frames of 400, near to key frames: decoding begins at these."""
    decoded = []
    plain = video_file._frames

    def counted(*arguments):
        for item in plain(*arguments):
            decoded.append(item[0])
            yield item

    monkeypatch.setattr(video_file, "_frames", counted)
    data = make_clip(frames=400, key_every=25, options={"sc_threshold": "0"})
    video = open_video_file(data, "video 0", "drop")
    assert len(decoded) == 1
    decoded.clear()
    frames = frames_of(video, [101, 303])
    assert len(decoded) <= 12
    monkeypatch.undo()
    every = plain_frames(data)
    np.testing.assert_array_equal(frames, [every[101], every[303]])


def test_a_file_without_a_clock_is_read_by_number(monkeypatch):
    plain = video_file._index
    monkeypatch.setattr(video_file, "_index", lambda *given: (np.arange(plain(*given)[0].size), np.empty(0, np.int64)))
    data = make_clip()
    every = plain_frames(data)
    frames = frames_of(open_video_file(data, "video 0", "drop"), [3, 30])
    np.testing.assert_array_equal(frames, [every[3], every[30]])


def test_many_threads_read_one_file(tmp_path):
    (tmp_path / "clip.mp4").write_bytes(make_clip())
    every = plain_frames((tmp_path / "clip.mp4").read_bytes())
    with open(tmp_path / "clip.mp4", "rb") as file:
        video = open_video_file(file, "video 0", "drop")
        results = [[] for _ in range(6)]
        threads = [threading.Thread(target=lambda r=r: r.append(frames_of(video, [3, 17, 35]))) for r in results]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for (frames,) in results:
        np.testing.assert_array_equal(frames, [every[3], every[17], every[35]])


TRUNCATED = ["H.264 with B-frames", "HEVC, 10 bits", "VP9", "MPEG-4 in AVI", "with alpha"]


@pytest.mark.parametrize("fraction", [0.02, 0.3, 0.97])
@pytest.mark.parametrize("case", TRUNCATED)
@pytest.mark.parametrize("faststart", [False, True])
def test_truncated_files_are_refused(case, fraction, faststart):
    clip = dict(CLIPS[case])
    if faststart:
        if clip.get("container", "mp4") != "mp4":
            pytest.skip("only MP4 has its index at either end")
        clip["options"] = {"movflags": "faststart"}
    data = make_clip(**clip)
    with pytest.raises(PromptError, match=r"ends early|end.? early|not a video") as caught:
        open_video_file(data[: int(len(data) * fraction)], "video 0", "white")
    assert "\n" not in str(caught.value)


def empty_clip():
    av = pytest.importorskip("av")
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.open()
        output.start_encoding()
    return file.getvalue()


def only_sound():
    av = pytest.importorskip("av")
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 8000, 0
        output.mux([*stream.encode(frame), *stream.encode(None)])
    return file.getvalue()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: b"", "is empty: 0 bytes"),
        (empty_clip, "has no video in it"),
        (only_sound, "has no video in it, only sound"),
        (lambda: b"#EXTM3U\n#EXTINF:1,\n/etc/hostname\n", "is not a video that can be read"),
        (lambda: b"ffconcat version 1.0\nfile /etc/hostname\n", "is not a video that can be read"),
        (lambda: parts.png(parts.picture(8, 8)), "it begins like a PNG"),
        (lambda: b"<html>nothing</html>" * 20, "it begins like an HTML page"),
        (lambda: b"\0\0\0\x18ftypisom" + bytes(12), "cannot be decoded"),
    ],
)
def test_what_is_no_video(make, message):
    with pytest.raises(PromptError, match=message) as caught:
        open_video_file(make(), "video 0", "white")
    assert "\n" not in str(caught.value)
    assert "hostname" not in str(caught.value)


@pytest.mark.parametrize("case", ["H.264 with B-frames", "VP9", "MPEG-4 in AVI", "transport stream", "GIF"])
def test_damage_is_one_line_or_nothing(case):
    """Whatever a few wrong bytes do: frames of the right size come out, or one line does."""
    data, rng = make_clip(**CLIPS[case]), np.random.default_rng(0)
    refused = 0
    for _ in range(12):
        broken = bytearray(data)
        for place in rng.integers(0, len(data), 6):
            broken[place] = rng.integers(0, 256)
        try:
            video = open_video_file(bytes(broken), "video 0", "white")
            assert video.total < 1000
            frames_of(video, sorted({0, video.total // 2, video.total - 1}))
        except PromptError as error:
            refused += 1
            lines = str(error).splitlines()
            assert len(lines) == 1
    assert refused < 12, "this would say nothing of what is decoded"


def test_frames_beyond_the_limit_are_refused(monkeypatch):
    monkeypatch.setattr(video_file, "MAX_FRAME_PIXELS", 64 * 48 - 1)
    with pytest.raises(PromptError, match=r"cannot be decoded|no frame that can be decoded"):
        open_video_file(make_clip(), "video 0", "white")


def test_files_that_only_take_time_are_bounded(monkeypatch):
    monkeypatch.setattr(video_file, "MAX_FRAMES", 39)
    with pytest.raises(PromptError, match="has more than 39 frames; cut it"):
        open_video_file(make_clip(), "video 0", "white")
    boxes = b"\0\0\0\x08free" * 300_000
    asked = []
    assert missing_bytes(lambda place, count: asked.append(place) or boxes[place : place + count], 10**9, "mov") >= 0
    assert len(asked) < 200_000


def test_a_file_that_grows_is_read_as_it_was(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(make_clip())
    with open(path, "rb") as file:
        source = video_file.Bytes(file)
        with open(path, "ab") as more:
            more.write(bytes(1000))
        assert len(source.at(0, 10**6)) == source.size < path.stat().st_size


@pytest.mark.filterwarnings("error")
def test_files_are_closed(tmp_path):
    (tmp_path / "clip.mp4").write_bytes(make_clip(frames=4))
    (tmp_path / "torn.mp4").write_bytes(make_clip(frames=4)[:-50])
    gc.collect()  # what other tests have left, which has files open as well
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        video = open_video_file(open(tmp_path / "clip.mp4", "rb"), "video 0", "white")  # noqa: SIM115
        frames_of(video, [0, 3])
        with pytest.raises(PromptError, match="ends early"):
            open_video_file(open(tmp_path / "torn.mp4", "rb"), "video 0", "white")  # noqa: SIM115
    del video
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_sources_of_files(tmp_path, monkeypatch):
    """Paths, file URLs, bytes and base64; what is not on a disk is bounded, what is no file is not waited for."""
    data = make_clip(frames=6)
    (tmp_path / "clip.mp4").write_bytes(data)
    processor = parts.make(tmp_path)

    def ids(**item):
        return processor.chat([{"role": "user", "content": [item]}]).token_ids

    path = str(tmp_path / "clip.mp4")
    expected = ids(type="video", video=path)
    text = base64.b64encode(data).decode()
    assert ids(type="video_url", video_url={"url": f"file://{path}"}) == expected
    assert ids(type="video", video=data) == expected
    assert ids(type="video", video=text) == expected
    assert ids(type="video", base64=text) == expected
    assert ids(type="video_url", video_url=f"data:video/mp4;base64,{text}") == expected
    assert ids(type="video", path=path, fps=10) != expected
    monkeypatch.setattr(fetch, "MAX_FILE_BYTES", len(data) - 1)
    assert ids(type="video", video=path) == expected, "a file on disk is not read as a whole"
    with pytest.raises(PromptError, match="bytes"):
        ids(type="video", video=data)
    with pytest.raises(PromptError, match="is not a regular file"):
        ids(type="video", video="/dev/zero")
    with pytest.raises(PromptError, match="which are for lists of frames"):
        ids(type="video", video=path, sample_fps=2)


def test_without_pyav_it_is_named(monkeypatch):
    data = make_clip(frames=2)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(OptionError, match=r"needs PyAV: pip install 'qwen3vl-moe\[video\]'"):
        open_video_file(data, "video 0", "white")
