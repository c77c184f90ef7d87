"""scripts/chat.py: commands, pictures at any turn, pasted paths; and the options that it shares with generate.py."""

from __future__ import annotations

import io
import sys

import pytest
from PIL import Image
from typer.testing import CliRunner

import chat
import cli_options
from qwen3vl_moe.engine import LLM, SamplingParams
from qwen3vl_moe.errors import OptionError, PromptError
from tests.inputs.clips import make_clip
from tests.scripts.generate.test_program import Typed


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "my cat's picture.png"
    Image.new("RGB", (24, 24), "green").save(path)
    return path


@pytest.fixture(scope="module")
def llm(plain):
    return LLM(plain.path, device="cpu", progress=False)


@pytest.fixture
def said(llm, monkeypatch, capsys):
    """``said(lines)``: what a chat of these lines hands to the model, turn by turn, and what stderr says."""

    def talk(*lines, stdin=Typed, system=None, images=(), fps=None):
        turns = []

        def stream(_, conversation, params):
            turns.append(conversation)
            if "fail" in str(conversation[-1]["content"]):
                raise PromptError("that cannot be said")
            return f"answer {len(turns)}"

        monkeypatch.setattr(chat, "stream", stream)
        monkeypatch.setattr(sys, "stdin", stdin("".join(f"{line}\n" for line in lines)))
        chat.talk(llm, list(images), SamplingParams(), system, fps)
        return turns, capsys.readouterr().err

    return talk


def contents(conversation):
    """Roles, and how many pictures and which text each message has."""
    found = []
    for message in conversation:
        items = message["content"]
        if isinstance(items, str):
            found.append((message["role"], 0, items))
        else:
            found.append((message["role"], len(items) - 1, items[-1]["text"]))
    return found


def test_pictures_come_at_any_turn(said, picture, pictures):
    turns, stderr = said("Hello", f"/image {picture}", f'/image "{pictures[0]}" {pictures[1]}', "And these?", "Bye")
    assert [contents(turn)[-1] for turn in turns] == [
        ("user", 0, "Hello"),
        ("user", 3, "And these?"),
        ("user", 0, "Bye"),
    ]
    assert [item["image"] for item in turns[1][-1]["content"][:-1]] == [str(picture), *map(str, pictures)]
    assert [role for role, *_ in contents(turns[2])] == ["user", "assistant", "user", "assistant", "user"]
    assert "3 pictures for your next message" in stderr


@pytest.mark.parametrize(
    "form",
    ["{plain}", "'{plain}' ", '"{plain}"', "{escaped}", "file://{url}", "{plain} {plain}", "'{plain}' {escaped}"],
)
def test_pasted_paths(said, tmp_path, form):
    """As terminals write what is dropped on them: quoted, with backslashes, or as a URL; and a question may follow."""
    path = tmp_path / ("a.png" if form.startswith("{plain}") else "my cat.png")
    Image.new("RGB", (24, 24)).save(path)
    pasted = form.format(plain=path, escaped=str(path).replace(" ", "\\ "), url=str(path).replace(" ", "%20"))
    count = form.count("{")
    [turn], _ = said(f"{pasted} What's this?")
    assert contents(turn) == [("user", count, "What's this?")]
    assert {item["image"] for item in turn[0]["content"][:-1]} == {str(path)}
    [turn], _ = said(pasted, "What's this?")
    assert contents(turn) == [("user", count, "What's this?")]


def test_videos_come_at_any_turn(said, picture, tmp_path):
    """By the command or as a pasted path, in the order in which they were added, with the frames that --fps says."""
    clip, other = tmp_path / "walk.mp4", tmp_path / "my walk.webm"
    clip.write_bytes(make_clip(frames=6))
    other.write_bytes(make_clip("webm", "libvpx", frames=6))
    lines = f"/video {clip}", f"/image {picture}", f"/video '{other}'", "What happens?", f"'{other}' And here?"
    first, second = said(*lines, fps=1.0)[0]
    assert [(item["type"], item.get(item["type"]), item.get("fps")) for item in first[-1]["content"][:-1]] == [
        ("video", str(clip), 1.0),
        ("image", str(picture), None),
        ("video", str(other), 1.0),
    ]
    assert contents(second)[-1] == ("user", 1, "And here?")
    _, stderr = said(*lines[:3])
    assert "1 video for your next message" in stderr
    assert "1 picture and 2 videos for your next message" in stderr
    assert "1 picture and 2 videos never asked about" in stderr
    [turn], _ = said(f"/video {clip}", str(clip), stdin=io.StringIO)
    assert contents(turn) == [("user", 1, str(clip))]


def test_a_pipe_names_files_by_the_command_alone(said, picture, pictures):
    [turn], _ = said(f"{pictures[0]}", stdin=io.StringIO)
    assert contents(turn) == [("user", 0, str(pictures[0]))]
    [turn], _ = said(f"/image {picture}", "Hello", stdin=io.StringIO)
    assert contents(turn) == [("user", 1, "Hello")]


def test_commands(said, pictures):
    turns, stderr = said(
        "Hello", f"/image {pictures[0]}", "/new", "Again", "/help", "/exit", "Never said", system="Be."
    )
    assert [contents(turn) for turn in turns] == [
        [("system", 0, "Be."), ("user", 0, "Hello")],
        [("system", 0, "Be."), ("user", 0, "Again")],
    ]
    assert all(command in stderr for command in chat.COMMANDS)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/image", "/image needs the path or URL of a picture"),
        ("/image nowhere.png", "image 0 ('nowhere.png'): there is no such file"),
        (f"/image {__file__}", "is not an image"),
        ("/video", "/video needs the path or URL of a video"),
        ("/video nowhere.mp4", "video 0 ('nowhere.mp4'): there is no such file"),
        (f"/video {__file__}", "is not a video that can be read"),
        ("/imag cat.png", "there is no command /imag; /help lists them"),
    ],
)
def test_a_command_that_cannot_be_used(said, line, message):
    turns, stderr = said(line, "Hello", "/home/me is a path", " /me is said")
    assert [contents(turn)[-1][2] for turn in turns] == ["Hello", "/home/me is a path", " /me is said"]
    assert f"error: {message}" in stderr or message in stderr
    with pytest.raises(PromptError, match=r"image|video|command"):
        said(line, stdin=io.StringIO)


def test_pictures_of_a_message_that_failed_stay(said, pictures):
    turns, stderr = said(f"/image {pictures[0]}", "fail", "Hello")
    assert contents(turns[1]) == [("user", 1, "Hello")]
    assert "1 picture still added" in stderr


def test_the_program_itself(plain, pictures):
    arguments = ["--model", str(plain.path), "--device", "cpu", "--max-tokens", "4", "--system", "Be brief."]
    result = CliRunner().invoke(chat.app, arguments, input=f"/image {pictures[0]}\nHi\n/exit\n")
    llm, image = LLM(plain.path, device="cpu", progress=False), {"type": "image", "image": pictures[0]}
    asked = [*chat.opening("Be brief."), chat.user_message([image], "Hi")]
    assert result.stdout == llm.chat(asked, SamplingParams(max_tokens=4))[0].outputs[0].text + "\n"
    assert result.exit_code == 0


def test_the_program_shows_a_video(plain, tmp_path):
    clip = tmp_path / "walk.mp4"
    clip.write_bytes(make_clip(frames=20))
    arguments = ["--model", str(plain.path), "--device", "cpu", "--max-tokens", "4", "--temperature", "0"]
    by_option = CliRunner().invoke(chat.app, [*arguments, "--video", str(clip), "--fps", "3"], input="Hi\n")
    by_command = CliRunner().invoke(chat.app, [*arguments, "--fps", "3"], input=f"/video {clip}\nHi\n")
    llm, video = LLM(plain.path, device="cpu", progress=False), {"type": "video", "video": clip, "num_frames": 6}
    [expected] = llm.chat([chat.user_message([video], "Hi")], SamplingParams(max_tokens=4, temperature=0))
    assert by_option.stdout == by_command.stdout == expected.outputs[0].text + "\n"
    assert f"{len(expected.prompt_token_ids)} prompt tokens" in by_command.stderr
    missing = CliRunner().invoke(chat.app, [*arguments, "--video", "nowhere.mp4"])
    assert missing.exit_code == 2
    assert missing.stderr == "error: video 0 ('nowhere.mp4'): there is no such file\n"


GIVEN = dict.fromkeys((*cli_options._SAMPLING, *cli_options._ENGINE, "sampling", "engine")) | {"eager": False}


def test_every_option_reaches_its_place():
    values = {
        "max_tokens": 3,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "seed": 4,
        "stop": ["x", "y"],
    }
    values |= {"repetition_penalty": 1.5, "presence_penalty": 0.25, "frequency_penalty": -0.5}
    more = '{"min_tokens": 2, "logit_bias": {"11": -5}, "n": 2}'
    made = cli_options.sampling_params(GIVEN | values | {"sampling": more})
    assert made == SamplingParams(**values, min_tokens=2, logit_bias={11: -5}, n=2)
    engine = {"max_num_seqs": 3, "gpu_memory_utilization": 0.5, "eager": True, "engine": '{"block_size": 32}'}
    assert cli_options.engine_options(GIVEN | engine) == {
        "max_num_seqs": 3,
        "gpu_memory_utilization": 0.5,
        "enforce_eager": True,
        "block_size": 32,
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sampling": "{"}, "--sampling '{' is no JSON"),
        ({"sampling": "[1]"}, "a JSON object such as"),
        ({"sampling": '{"top_k": 2}', "top_k": 3}, "--sampling says top_k, for which there is --top-k: name one"),
        ({"sampling": '{"best": 1}'}, "unknown sampling parameter 'best'"),
        ({"sampling": '{"self": 1}'}, "--sampling says self, which is no option"),
        ({"sampling": '{"logit_bias": {"²": 1}}'}, "logit_bias has the key '²'; a token id is needed"),
        ({"sampling": '{"n": 2}'}, "n=2: one answer is shown here"),
        ({"sampling": '{"logprobs": 2}'}, "logprobs=2: only the answer is shown here"),
        ({"sampling": '{"detokenize": false}'}, "detokenize=False: an answer is shown as text"),
    ],
)
def test_sampling_that_cannot_be_used(given, message):
    with pytest.raises(OptionError, match=message):
        cli_options.sampling_params(GIVEN | given, one_answer=True)
