"""Which files, hosts and addresses a request may name."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from qwen3vl_moe.errors import OptionError, PromptError
from qwen3vl_moe.inputs.access import MediaAccess, media_access
from qwen3vl_moe.inputs.image_source import open_image
from tests.inputs.parts import PLACEHOLDER, make
from tests.pictures import encoded, noise


class TestFiles:
    @pytest.fixture
    def root(self, tmp_path, monkeypatch) -> Path:
        inside, outside = tmp_path / "root" / "deep", tmp_path / "outside"
        inside.mkdir(parents=True)
        outside.mkdir()
        for folder in (inside.parent, inside, outside):
            (folder / "a.png").write_bytes(encoded(noise(8, 8)))
        (inside / "out").symlink_to(outside)
        (inside / "out.png").symlink_to(outside / "a.png")
        (inside / "in.png").symlink_to("../a.png")
        (tmp_path / "rootless").mkdir()
        (tmp_path / "rootless" / "a.png").write_bytes(encoded(noise(8, 8)))
        (tmp_path / "link").symlink_to(inside.parent)
        monkeypatch.chdir(tmp_path)
        return inside.parent

    @pytest.mark.parametrize("given", ["root", "link", "root/deep/.."])
    @pytest.mark.parametrize(
        "name", ["root/a.png", "root/deep/a.png", "root/deep/../a.png", "root/deep/in.png", "link/a.png"]
    )
    def test_within(self, root, given, name):
        access = media_access(given)
        for source in (name, Path(name), Path(name).absolute(), f"file://{Path(name).absolute()}"):
            assert open_image(source, 0, access).size_text == "8x8"

    @pytest.mark.parametrize(
        "name",
        [
            "outside/a.png",
            "root/../outside/a.png",
            "root/deep/out/a.png",
            "root/deep/out.png",
            "rootless/a.png",
            "outside/not-there.png",
            "/etc/hostname",
            "/dev/zero",
            "/proc/self/environ",
        ],
    )
    def test_outside(self, root, name):
        """Whether there is such a file cannot be told from the answer."""
        for source in (name, Path(name), f"file://{Path(name).absolute()}"):
            with pytest.raises(PromptError, match=r"image 3 .* is not within media_root, '.*/root', as local files"):
                open_image(source, 3, media_access(root))

    def test_what_is_no_file_is_taken(self, root):
        data = encoded(noise(8, 8))
        assert open_image(data, 0, media_access(root)).size_text == "8x8"
        assert open_image(noise(8, 8), 0, media_access(root)).size_text == "8x8"

    def test_prompts_are_held_to_it(self, root, tmp_path_factory):
        """And to the way that transparency is treated."""
        clear = Image.new("RGBA", (8, 8))
        clear.save(root / "clear.png")
        folder = tmp_path_factory.mktemp("processor")
        for alpha, value in (("white", 255), ("drop", 0)):
            processor = make(folder, access=media_access(root), alpha=alpha)
            ask = {"prompt": PLACEHOLDER, "multi_modal_data": {"image": "root/clear.png"}}
            (image,) = processor.prompt(ask).images
            assert (image.picture.pixels == value).all()
            with pytest.raises(PromptError, match=r"image 0 .* is not within media_root"):
                processor.prompt({**ask, "multi_modal_data": {"image": "outside/a.png"}})
        with pytest.raises(OptionError, match="alpha is 'grey'"):
            make(folder, alpha="grey")

    @pytest.mark.parametrize("given", ["not-there", "root/a.png", "a\0b", "\ud800"])
    def test_no_directory(self, root, given):
        with pytest.raises(OptionError, match="is not a directory"):
            media_access(given)


class TestHosts:
    @pytest.mark.parametrize(
        ("rules", "allowed", "refused"),
        [
            (
                "example.org",
                ["example.org", "EXAMPLE.org", "example.org."],
                ["www.example.org", "example.org.evil.net", "org"],
            ),
            (".example.org", ["example.org", "a.b.example.org"], ["badexample.org", "example.orgy"]),
            ("a.net, b.net", ["a.net", "b.net"], ["c.net"]),
            (["B\u00fccher.de"], ["b\u00fccher.de", "xn--bcher-kva.de"], ["bucher.de"]),
            (
                ["127.0.0.1", "[::1]"],
                ["127.0.0.1", "::1", "[::1]", "0:0::1"],
                ["127.0.0.2", "0x7f000001", "2130706433"],
            ),
            ([], [], ["example.org", ""]),
            ("", [], ["example.org"]),
            (None, ["example.org", "127.0.0.1"], []),
        ],
    )
    def test_names(self, rules, allowed, refused):
        access = media_access(allow_hosts=rules)
        for host in allowed:
            access.check_host(host, "image 0")
        for host in refused:
            with pytest.raises(PromptError, match=r"image 0 .* is not one of allow_hosts"):
                access.check_host(host, "image 0")

    @pytest.mark.parametrize(
        "rules",
        [
            ["http://a.net"],
            ["a.net:80"],
            ["a.net/x"],
            ["*.a.net"],
            ["a b"],
            [""],
            ["."],
            ["[::1]:80"],
            [7],
            "a,b:1",
            ["\ud800"],
        ],
    )
    def test_no_name(self, rules):
        with pytest.raises(OptionError, match="the name of a host is needed, such as"):
            media_access(allow_hosts=rules)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::808:808", True),
        ("127.0.0.1", False),
        ("127.255.255.254", False),
        ("0.0.0.0", False),
        ("10.1.2.3", False),
        ("172.31.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),  # metadata of most clouds
        ("100.100.100.200", False),  # of Alibaba's
        ("168.63.129.16", False),  # of Azure's
        ("192.0.0.192", False),  # of Oracle's
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fd00:ec2::254", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
    ],
)
def test_addresses(address, public):
    MediaAccess().check_address(address, "host", "image 0")
    if public:
        MediaAccess(private_hosts=False).check_address(address, "host", "image 0")
    else:
        with pytest.raises(
            PromptError, match=r"image 0 .*the host 'host' has an address of this machine or of a private"
        ):
            MediaAccess(private_hosts=False).check_address(address, "host", "image 0")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"media_root": 5}, "media_root=5: a directory is needed"),
        ({"allow_hosts": 5}, "allow_hosts=5: names of hosts are needed"),
        ({"allow_private_hosts": "no"}, "allow_private_hosts='no': True or False is needed"),
    ],
)
def test_limits_of_another_type_are_refused(given, message):
    with pytest.raises(OptionError, match=message):
        media_access(**given)
