"""Videos over HTTP: answered as in process, and bounded before they are decoded."""

import pytest

from qwen3vl_moe import SamplingParams
from qwen3vl_moe.errors import PromptError
from qwen3vl_moe.inputs.access import MediaAccess
from qwen3vl_moe.server.limits import Limits
from qwen3vl_moe.server.media import MediaLimits, with_bytes
from tests.inputs.clips import make_clip
from tests.inputs.web import serve
from tests.pictures import encoded, noise
from tests.server.conftest import data_url, served

CLIP = pytest.importorskip("av") and make_clip(frames=30, rate=10, size=(96, 64))
URL = data_url(CLIP, "video/mp4")
TEXT = {"type": "text", "text": "What happens?"}


def asking(*items):
    return [{"role": "user", "content": [*items, TEXT]}]


def video(url=URL, **options):
    return {"type": "video_url", "video_url": {"url": url, **options}}


@pytest.mark.parametrize(
    "item",
    [
        video(num_frames=6),
        {"type": "video_url", "video_url": URL, "num_frames": 6},
        {**video(fps=2), "min_frames": 6},
    ],
    ids=["in the object", "beside a bare URL", "both"],
)
def test_a_video_is_answered_as_in_process(server, item):
    """Greedy tokens, log-probabilities and counts are those of the same frames in the library."""
    picture = encoded(noise(40, 50))
    local = asking({"type": "image", "image": picture}, {"type": "video", "video": CLIP, "num_frames": 6})
    [expected] = server.llm.chat(local, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=0))
    image = {"type": "image_url", "image_url": {"url": data_url(picture)}}
    reply = server.chat(asking(image, item), max_tokens=8, ignore_eos=True, logprobs=True)
    assert reply.status_code == 200, reply.text
    body = reply.json()
    assert body["choices"][0]["message"]["content"] == expected.outputs[0].text
    shown = [each["logprob"] for each in body["choices"][0]["logprobs"]["content"]]
    of_tokens = zip(expected.outputs[0].logprobs, expected.outputs[0].token_ids, strict=True)
    assert shown == pytest.approx([step[token].logprob for step, token in of_tokens], abs=1e-4)
    assert body["usage"]["prompt_tokens"] == len(expected.prompt_token_ids)
    assert body["usage"]["prompt_tokens_details"]["image_tokens"] == expected.num_image_tokens


def test_videos_have_limits(make_demo):
    media = MediaLimits(
        videos=1,
        video_bytes=20_000,
        video_pixels=30 * 96 * 64,
        video_frames=8,
        total_pixels=100_000,
        image_pixels=96 * 64,
    )
    long, wide = make_clip(frames=31, rate=10, size=(96, 64)), make_clip(frames=2, size=(128, 64))
    heavy = CLIP + bytes(20_000)
    with served(make_demo(), limits=Limits(media=media)) as running:
        cases = [
            (asking(video(), video()), "there are 2 videos; this server takes 1 in a request"),
            (asking(video(data_url(heavy))), f"video 0 has {len(heavy)} bytes; this server takes 20000 at most"),
            (asking(video(data_url(long))), "video 0 has 31 frames of 96x64 pixels; this server takes 184320 pixels"),
            (asking(video(data_url(wide))), "video 0 is of 128x64 pixels; this server takes 6144 of an image"),
            (asking(video(num_frames=9)), "messages[0].content[0] has num_frames 9; this server's most is 8"),
            (asking({**video(), "max_frames": 9}), "has max_frames 9; this server's most is 8"),
            (asking(video(min_frames=9)), "has min_frames 9; this server's most is 8"),
            (asking(video(total_pixels=100_001)), "has total_pixels 100001; this server's most is 100000"),
            (asking({**video(fps=1), "fps": 2}), "gives 'fps' twice: beside video_url and in it"),
            (asking(video(fps="fast")), "has fps 'fast'"),
            (asking(video(resized_height=64)), "has the key 'resized_height'"),
            (asking(video(num_frames=2, fps=1)), "one of them is enough"),
            (asking(video(data_url(CLIP[:-200]))), "video 0 ends early"),
            (asking(video(data_url(b"nothing"))), "video 0 is not a video that can be read"),
            (asking(video(data_url(encoded(noise(40, 40))))), "it begins like"),
            (asking(video("data:video/mp4;base64,####")), "not valid base64"),
            (asking(video("http://127.0.0.1/x.mp4")), "--allow-remote-images"),
            (asking({"type": "video_url", "url": URL}), "has the key 'url'"),
        ]
        for messages, said in cases:
            reply = running.chat(messages, max_tokens=1)
            assert reply.status_code == 400, said
            assert said in reply.json()["error"]["message"]
        # What is taken without being asked for is bounded, too: three seconds at 25 a second.
        reply = running.chat(asking(video(fps=25)), max_tokens=1)
        assert reply.status_code == 200, reply.text
        local = asking({"type": "video", "video": CLIP, "num_frames": 8})
        expected = len(running.llm.processor.chat(local).token_ids)
        assert reply.json()["usage"]["prompt_tokens"] == expected
        running.settles()


def test_a_checkpoint_may_take_fewer_frames_than_a_request_may_ask_for():
    def most(**options):
        limits = MediaLimits(usual_frames=4, video_frames=8)
        return with_bytes(asking(video(**options)), limits)[0]["content"][0].get("max_frames")

    assert [most(fps=25), most(fps=25, max_frames=8), most(num_frames=8)] == [4, 8, None]
    assert with_bytes(asking(video()), MediaLimits(usual_frames=9, video_frames=8))[0]["content"][0]["max_frames"] == 8


def test_remote_videos_come_from_allowed_hosts_alone(make_demo):
    with serve(lambda client: (client.read_head(), client.reply("200 OK", CLIP))) as port:
        url = f"http://127.0.0.1:{port}/clip.mp4"
        off, reached = MediaLimits(remote=True), MediaLimits(remote=True, access=MediaAccess(private_hosts=True))
        other = MediaLimits(remote=True, access=MediaAccess(allow_hosts=("example.org",), private_hosts=True))
        small = MediaLimits(remote=True, access=MediaAccess(private_hosts=True), video_bytes=len(CLIP) - 1)
        asked = asking(video(url, num_frames=2))
        for media, said in ((off, "private network"), (other, "allow_hosts"), (small, "video 0")):
            with pytest.raises(PromptError, match=said):
                with_bytes(asked, media)
        with served(make_demo(), limits=Limits(media=reached)) as running:
            assert running.chat(asked, max_tokens=1).status_code == 200


def test_a_client_that_goes_away_leaves_nothing(server):
    with server.http.stream("POST", "/v1/chat/completions", json={
        "messages": asking(video(num_frames=4)), "max_tokens": 400, "ignore_eos": True, "stream": True,
    }) as response:  # fmt: skip
        assert next(response.iter_lines())
