"""Reading checkpoint files: nothing in them runs, and damaged ones are refused."""

import codecs
import os
import struct
import zipfile

import pytest
import torch
from oracle import STAGE_2, published

from modeling_flm.hub.checkpoints import CheckpointError, LightningCheckpoint
from modeling_flm.hub.convert import convert, main


class _Runs:
    """Unpickled by `pickle`, it makes a file."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class _RunsWhenItsStateIsSet:
    def __init__(self, path):
        self.path = path

    def __setstate__(self, state):
        open(state["path"], "w").close()


def rewrite(source, target, edit, compression=zipfile.ZIP_STORED):
    """Copies an archive, with `edit(name, content)` in the place of each member's content."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for member in old.infolist():
            new.writestr(member.filename, edit(member.filename, old.read(member)))


def member_of(name: str) -> str:
    """The member of the archive that has the numbers of an averaged weight."""
    checkpoint = LightningCheckpoint(STAGE_2)
    return checkpoint.members[checkpoint.weights()[name].untyped_storage().data_ptr()].filename


class TestHostileFiles:
    def refuse(self, tmp_path, match, *flags):
        """Neither a model nor anything left of it."""
        before = sorted(os.listdir(tmp_path))
        with pytest.raises(SystemExit, match=match):
            main(["--checkpoint", str(tmp_path / "x.ckpt"), "--output", str(tmp_path / "out"), *flags])
        assert sorted(os.listdir(tmp_path)) == before

    def test_nothing_in_the_file_runs(self, tmp_path):
        marks = [tmp_path / f"mark{n}" for n in range(4)]
        content = published()
        content["callbacks"] = [
            _Runs(open, str(marks[0]), "w"),
            _Runs(eval, f"open({str(marks[1])!r}, 'w')"),
            _RunsWhenItsStateIsSet(str(marks[2])),
        ]
        content["hyper_parameters"]["config"]["extra"] = _Runs(exec, f"open({str(marks[3])!r}, 'w')")
        torch.save(content, tmp_path / "x.ckpt")
        model = convert(tmp_path / "x.ckpt", raw_weights=True)
        assert model.config.num_attention_heads == 3
        assert not any(mark.exists() for mark in marks)
        # The file does what it is meant to where it is trusted.
        torch.load(tmp_path / "x.ckpt", weights_only=False)
        assert all(mark.exists() for mark in marks)

    def test_names_that_torch_blocks(self, tmp_path):
        torch.save(published() | {"callbacks": _Runs(os.system, f"touch {tmp_path / 'mark'}")}, tmp_path / "x.ckpt")
        self.refuse(tmp_path, "posix.system", "--raw-weights")

    @pytest.mark.parametrize("name", ["subclass", "parameter", "hooks", "codec"])
    def test_names_that_torch_allows(self, name, tmp_path):
        """Functions of torch that call, or hand on, what a file gives them."""
        mark = tmp_path / "mark"
        opens = f"open({str(mark)!r}, 'w')"
        tensor, state = torch.ones(2), {"grad": _Runs(eval, opens)}
        content = published() | {
            "callbacks": {
                "subclass": _Runs(torch._tensor._rebuild_from_type_v2, eval, _Runs, (opens,), state),
                "parameter": _Runs(torch._utils._rebuild_parameter_with_state, tensor, False, {}, state),
                "hooks": _Runs(torch._utils._rebuild_parameter, tensor, True, {0: _Runs(eval, opens)}),
                "codec": _Runs(codecs.encode, opens, _Runs(eval, opens)),
            }[name]
        }
        torch.save(content, tmp_path / "x.ckpt")
        try:
            convert(tmp_path / "x.ckpt", raw_weights=True)
        except CheckpointError as error:
            assert "cannot be read" in str(error)
        assert not mark.exists()

    def test_names_that_this_process_allows(self, tmp_path):
        mark = tmp_path / "mark"
        torch.save(published() | {"callbacks": _RunsWhenItsStateIsSet(str(mark))}, tmp_path / "x.ckpt")
        with torch.serialization.safe_globals([_RunsWhenItsStateIsSet]):
            convert(tmp_path / "x.ckpt", raw_weights=True)
            assert not mark.exists()
            torch.load(tmp_path / "x.ckpt", weights_only=True)  # as it was before
            assert mark.exists()

    def test_a_tensor_that_is_code(self, tmp_path):
        mark = tmp_path / "mark"
        content = published(**{"backbone.output_layer.linear.bias": _Runs(eval, f"open({str(mark)!r}, 'w')")})
        torch.save(content, tmp_path / "x.ckpt")
        self.refuse(tmp_path, "missing: lm_head.bias", "--raw-weights")
        assert not mark.exists()

    @pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
    def test_truncated(self, share, tmp_path):
        content = STAGE_2.read_bytes()
        (tmp_path / "x.ckpt").write_bytes(content[: int(share * len(content))])
        self.refuse(tmp_path, "truncated")

    def test_damaged(self, tmp_path):
        content = bytearray(STAGE_2.read_bytes())
        with zipfile.ZipFile(STAGE_2) as archive:
            content[archive.getinfo(member_of("embed_tokens.weight")).header_offset + 1000] ^= 255
        (tmp_path / "x.ckpt").write_bytes(content)
        self.refuse(tmp_path, "cannot be read: BadZipFile: Bad CRC")

    def test_compressed(self, tmp_path):
        def edit(name, content):
            return content + b"\0" * 10**7 if name.endswith("/data/0") else content

        rewrite(STAGE_2, tmp_path / "x.ckpt", edit, zipfile.ZIP_DEFLATED)
        self.refuse(tmp_path, "declares .* bytes of content")

    def test_declared_size_of_a_member(self, tmp_path):
        content = bytearray(STAGE_2.read_bytes())
        with zipfile.ZipFile(STAGE_2) as archive:
            entry = content.index(b"PK\x01\x02", archive.start_dir)
        content[entry + 24 : entry + 28] = struct.pack("<I", 2**31)  # its uncompressed size
        (tmp_path / "x.ckpt").write_bytes(content)
        self.refuse(tmp_path, "declares .* bytes of content")

    def test_storage_that_is_too_small(self, tmp_path):
        member = member_of("embed_tokens.weight")
        rewrite(STAGE_2, tmp_path / "x.ckpt", lambda name, content: content[:-4] if name == member else content)
        self.refuse(tmp_path, "cannot be read: ValueError: the sizes of its tensors")

    def test_storage_that_is_not_there(self, tmp_path):
        with zipfile.ZipFile(STAGE_2) as old, zipfile.ZipFile(tmp_path / "x.ckpt", "w") as new:
            for member in old.infolist():
                if not member.filename.endswith("/data/0"):
                    new.writestr(member.filename, old.read(member))
        self.refuse(tmp_path, "cannot be read", "--raw-weights")

    def test_shape_that_is_larger_than_its_numbers(self, tmp_path):
        huge = torch.zeros(1).expand(48, 10**9)
        torch.save(published(**{"backbone.blocks.0.norm1.weight": huge}), tmp_path / "x.ckpt")
        self.refuse(tmp_path, "wrong shape: layers.0.norm1.weight", "--raw-weights")
        huge = torch.zeros(1).expand(10**9, 48)
        torch.save(published(**{"backbone.vocab_embed.embedding": huge}), tmp_path / "x.ckpt")
        self.refuse(tmp_path, "wrong shape: lm_head", "--raw-weights")
        content = published(**{"backbone.vocab_embed.embedding": huge})
        content["state_dict"]["backbone.output_layer.linear.weight"] = huge
        content["state_dict"]["backbone.output_layer.linear.bias"] = torch.zeros(1).expand(10**9)
        torch.save(content, tmp_path / "x.ckpt")
        self.refuse(tmp_path, "is .* bytes large, but its tensors need 388,000", "--raw-weights")

    # Each is small, and would take all memory, all time or the whole process of `pickle`. Two others still do so with torch:
    # a key that is a tuple nested a million times, or one that contains the one before twice, sixty times.
    BOMBS = {
        "doubled key": b"}" + b")" + b"2\x86" * 60 + b"Ns.",
        "memo index": b"}r\xff\xff\xff\x7f.",
        "storage key": b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n)"
        + b"2\x86" * 60
        + b"X\x03\x00\x00\x00cpuK\x01tQ.",
        "nested list": b"]" * 10**5 + b"a" * (10**5 - 1) + b".",
        "long string": b"X\xff\xff\xff\x7fabc.",
        "no mark": b"t.",
        "no end": b"}",
        "old opcode": b"(ios\nsystem\n.",
        # A long string, once, in 20,000 names; and a long tuple, once, for 20,000 shapes
        "long names": b"X" + struct.pack("<I", 10**6) + b"a" * 10**6 + b"q\x00" + b"h\x00h\x00\x93" * 20_000 + b".",
        "long storage keys": b"X"
        + struct.pack("<I", 10**6)
        + b"a" * 10**6
        + b"q\x00(X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
        + b"h\x00X\x03\x00\x00\x00cpuK\x01tq\x01"
        + b"h\x01Q" * 20_000
        + b".",
        "long shapes": b"ctorch._utils\n_rebuild_tensor_v2\nq\x00("
        + b"K\x01" * 20_000
        + b"tq\x01(K\x00K\x00h\x01h\x01tq\x02"
        + b"h\x00h\x02R" * 20_000
        + b".",
    }

    @pytest.mark.parametrize("name", BOMBS)
    def test_bombs(self, name, tmp_path):
        def edit(member, content):
            return self.BOMBS[name] if member.endswith("data.pkl") else content

        rewrite(STAGE_2, tmp_path / "x.ckpt", edit)
        self.refuse(tmp_path, "no `state_dict`|cannot be read")

    def test_many_blocks_of_one_storage(self, tmp_path):
        shared = torch.zeros(10**5)
        names = {name: tensor.shape for name, tensor in published()["state_dict"].items()}
        changes = {name: shared.as_strided(shape, torch.zeros(shape).stride()) for name, shape in names.items()}
        block = {name: tensor for name, tensor in changes.items() if ".blocks.0." in name}
        for index in range(2, 300):
            changes |= {name.replace(".0.", f".{index}.", 1): tensor for name, tensor in block.items()}
        torch.save(published(**changes), tmp_path / "x.ckpt")
        self.refuse(tmp_path, "bytes large, but its tensors need", "--raw-weights")

    def test_many_names_of_blocks(self, tmp_path):
        changes = {f"backbone.blocks.{index}.x": torch.zeros(0) for index in range(2, 3000)}
        torch.save(published(**changes), tmp_path / "x.ckpt")
        self.refuse(tmp_path, r"missing: layers.*\n    and [\d,]+ more", "--raw-weights")

    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"n_heads": 0}, "does not record a valid `num_attention_heads`"),
            ({"n_heads": -3}, "does not record a valid `num_attention_heads`"),
            ({"n_heads": True}, "does not record a valid `num_attention_heads`"),
            ({"n_heads": 5}, "No model has these sizes.*multiple of twice"),
            ({"length": 0}, "does not record a valid `max_position_embeddings`"),
            ({"length": 10**30}, "does not record a valid `max_position_embeddings`"),
        ],
    )
    def test_settings_that_make_no_sense(self, changes, message, tmp_path):
        torch.save(published(model=changes), tmp_path / "x.ckpt")
        self.refuse(tmp_path, message, "--raw-weights")

    @pytest.mark.parametrize("dropout", [5, -1, float("nan"), "a"])
    def test_dropout_that_makes_no_sense_is_left_out(self, dropout, tmp_path):
        torch.save(published(model={"dropout": dropout}), tmp_path / "x.ckpt")
        assert convert(tmp_path / "x.ckpt", raw_weights=True).config.dropout == 0.1

    def test_names(self, tmp_path):
        torch.save(published(**{"\x1b[2J\nerror: all is well": torch.zeros(1)}), tmp_path / "x.ckpt")
        with pytest.raises(SystemExit) as error:
            main(["--checkpoint", str(tmp_path / "x.ckpt"), "--output", str(tmp_path / "out"), "--raw-weights"])
        assert "\x1b" not in str(error.value) and "\nerror" not in str(error.value)
        torch.save(published(**{"norm.weight": torch.zeros(48)}), tmp_path / "x.ckpt")
        self.refuse(tmp_path, "two tensors for 'norm.weight'", "--raw-weights")

    def test_not_a_checkpoint(self, tmp_path):
        torch.save({"weights": 1}, tmp_path / "x.ckpt")
        self.refuse(tmp_path, "no `state_dict`")
        torch.save(torch.zeros(3), tmp_path / "x.ckpt")
        self.refuse(tmp_path, "no `state_dict`")
        with zipfile.ZipFile(tmp_path / "x.ckpt", "w") as archive:
            archive.writestr("hello.txt", "hello")
        self.refuse(tmp_path, "is not a checkpoint")
        rewrite(STAGE_2, tmp_path / "x.ckpt", lambda name, content: b"garbage" if "data.pkl" in name else content)
        self.refuse(tmp_path, "cannot be read")
