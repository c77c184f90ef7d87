"""The files that a processor is read from: what may be where, what is refused, and the tiny ones made here."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
from transformers import PreTrainedTokenizerFast

from benchmarking.tiny import write_processor_dir
from qwen3vl_moe.errors import CheckpointError, ConfigError, OptionError, PromptError
from qwen3vl_moe.inputs.processor import Processor
from tests.inputs.parts import CONVERSATIONS, VOCAB_SIZE, make, oracle_for, user


class TestFiles:
    def test_template_places(self, processor, directory, tmp_path):
        for name, content in (
            ("chat_template.json", {"chat_template": processor.chat_template}),
            ("tokenizer_config.json", {"tokenizer_class": "x", "chat_template": processor.chat_template}),
        ):
            copy = tmp_path / name
            shutil.copytree(directory, copy)
            (copy / "chat_template.jinja").unlink()
            (copy / name).write_text(json.dumps(content))
            assert Processor.from_pretrained(copy, processor.config).chat_template == processor.chat_template

    def test_no_template(self, processor, directory, tmp_path):
        copy = shutil.copytree(directory, tmp_path / "copy")
        (copy / "chat_template.jinja").unlink()
        bare = Processor.from_pretrained(copy, processor.config)
        assert bare.prompt("a").token_ids == processor.prompt("a").token_ids
        with pytest.raises(PromptError, match="the checkpoint has no chat template"):
            bare.chat(user("a"))
        (copy / "chat_template.json").write_text('{"chat_template": {"default": "x"}}')
        with pytest.raises(ConfigError, match=r"chat_template\.json: chat_template is a dict"):
            Processor.from_pretrained(copy, processor.config)

    def test_as_transformers_saves_them(self, processor, tmp_path):
        oracle = oracle_for(processor)
        oracle.image_processor.save_pretrained(tmp_path)
        oracle.tokenizer.chat_template = processor.chat_template
        oracle.tokenizer.save_pretrained(tmp_path)
        saved = Processor.from_pretrained(tmp_path, processor.config)
        assert saved.image_settings == processor.image_settings
        messages = CONVERSATIONS["several turns"][0]
        assert saved.chat(messages).token_ids == processor.chat(messages).token_ids

    def test_truncation_of_the_tokenizer_file_is_not_used(self, processor, directory, tmp_path):
        copy = shutil.copytree(directory, tmp_path / "copy")
        tokenizer = PreTrainedTokenizerFast.from_pretrained(copy).backend_tokenizer
        tokenizer.enable_truncation(4)
        tokenizer.enable_padding(length=64)
        tokenizer.save(str(copy / "tokenizer.json"))
        text = "one two three four five six seven"
        expected = processor.prompt(text).token_ids
        assert len(expected) > 4
        assert Processor.from_pretrained(copy, processor.config).prompt(text).token_ids == expected

    def test_missing_or_damaged_tokenizer(self, processor, directory, tmp_path):
        copy = shutil.copytree(directory, tmp_path / "copy")
        (copy / "tokenizer.json").write_text('{"model": ')
        with pytest.raises(CheckpointError, match=r"tokenizer\.json or its tokenizer_config\.json cannot be read"):
            Processor.from_pretrained(copy, processor.config)
        (copy / "tokenizer.json").unlink()
        with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing"):
            Processor.from_pretrained(copy, processor.config)

    def test_files_of_another_model(self, processor, directory):
        config = processor.config
        for other, message in (
            (replace(config, vision=replace(config.vision, patch_size=14)), "have patch_size 4, the model's"),
            (replace(config, vision=replace(config.vision, merge_size=3)), "have merge_size 2, the model's"),
            (replace(config, image_token_id=7), r"has <\|image_pad\|> as id 421, the model's config.json as 7"),
            (replace(config, text=replace(config.text, vocab_size=422)), "id 422, the model's vocab_size is 422"),
        ):
            with pytest.raises(ConfigError, match=message):
                Processor.from_pretrained(directory, other)

    @pytest.mark.parametrize("word", ["Ġthe", "a"])
    def test_ids_with_gaps(self, processor, directory, tmp_path, word):
        # As many tokens as the vocabulary holds, one of them beyond its end.
        copy = shutil.copytree(directory, tmp_path / "copy")
        content = json.loads((copy / "tokenizer.json").read_text())
        content["model"]["vocab"][word] = VOCAB_SIZE
        (copy / "tokenizer.json").write_text(json.dumps(content))
        with pytest.raises(ConfigError, match=rf"the tokenizer has '{word}' as id 512, the model's vocab_size is 512"):
            Processor.from_pretrained(copy, processor.config)

    def test_published_tokenizer(self, published):
        # As transformers' own class of this tokenizer reads it.
        from transformers import AutoTokenizer

        oracle = AutoTokenizer.from_pretrained(published.tokenizer.name_or_path)
        for text in ("Hello world", "don't  12345\n\n\tx", "Grüße 世界 ☕ 👩‍👩‍👧", "<|im_start|>user\n<think>", " é é"):
            assert published.prompt(text).token_ids == oracle(text).input_ids


class TestTiny:
    def test_same_files_every_time(self, directory, tmp_path):
        make(tmp_path)
        for file in directory.iterdir():
            assert file.read_bytes() == (tmp_path / file.name).read_bytes()

    @pytest.mark.parametrize("vocab_size", [263, 300, 512, 5000])
    def test_ids_fit_and_text_comes_back(self, tmp_path, vocab_size):
        ids = write_processor_dir(tmp_path, vocab_size=vocab_size)
        assert ids.size <= min(vocab_size, 423)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
        assert sorted(tokenizer.get_vocab().values()) == list(range(ids.size))
        assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (ids.im_end, ids.endoftext)
        text = "What is in the picture? Grüße, 世界 ☕\n"
        assert tokenizer.decode(tokenizer(text).input_ids) == text

    def test_too_small(self, tmp_path):
        with pytest.raises(OptionError, match="vocab_size=262 is too small"):
            write_processor_dir(tmp_path, vocab_size=262)
