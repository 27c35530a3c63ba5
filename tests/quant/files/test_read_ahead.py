"""Files read ahead in chunks: every byte in its place, a bounded number of them in memory, and digests on the way."""

import hashlib
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from halfbyte.quant.files import digest as digests
from halfbyte.quant.files import read_ahead
from halfbyte.quant.files.digest import combined, file_digest
from halfbyte.quant.files.read_ahead import ReadAhead
from halfbyte.quant.files.shards import INDEX_FILE, WEIGHTS_FILE, ShardedWeights, write_weights

CPU = torch.device("cpu")
CHUNK = 512


@pytest.fixture
def small_chunks(monkeypatch):
    for module in (read_ahead, digests):
        monkeypatch.setattr(module, "CHUNK_BYTES", CHUNK)
        monkeypatch.setattr(module, "READING_THREADS", 3)


@pytest.fixture
def tensors():
    draws = torch.Generator().manual_seed(0)
    drawn = {f"layer.{n}.weight": torch.randn(n, 37, generator=draws).bfloat16() for n in range(1, 40)}
    return drawn | {
        "empty": torch.empty(0, 4),
        "number": torch.tensor(3.0),
        "codes": torch.arange(1999, dtype=torch.int32).to(torch.uint8),
        "mask": torch.rand(5, 7, generator=draws) > 0.5,
    }


@pytest.fixture(params=[10**9, 10_000])
def folder(request, tensors, tmp_path):
    write_weights(
        ({name: tensor} for name, tensor in tensors.items()), tmp_path, max_shard_bytes=request.param
    )
    assert (tmp_path / INDEX_FILE).exists() == (request.param < 10**9)
    return tmp_path


def test_every_tensor_arrives_whole_in_the_order_of_the_files(folder, tensors, small_chunks):
    with ShardedWeights(folder) as weights:
        read = list(ReadAhead(weights, weights.names, CPU))
        assert [name for name, _ in read] == weights.names
    for name, tensor in read:
        assert tensor.dtype == tensors[name].dtype
        assert tensor.shape == tensors[name].shape
        assert torch.equal(tensor, tensors[name]), name


def test_what_is_not_asked_for_is_not_read(folder, tensors, small_chunks, monkeypatch):
    reads = []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *arguments: reads.append(arguments) or preadv(*arguments))
    with ShardedWeights(folder) as weights:
        ((name, tensor),) = ReadAhead(weights, ["layer.39.weight"], CPU)
    assert torch.equal(tensor, tensors[name])
    assert len(reads) <= tensor.nbytes // CHUNK + 2


def test_digests_are_those_of_the_files(folder, small_chunks):
    told = {}
    with ShardedWeights(folder) as weights:
        list(ReadAhead(weights, ["number"], CPU, on_file=told.__setitem__))
        assert told == {path: file_digest(path) for path in weights.files}
    for path, digest in told.items():
        data = path.read_bytes()
        chunks = [data[start : start + CHUNK] for start in range(0, len(data), CHUNK)]
        assert digest == combined([hashlib.sha256(chunk).digest() for chunk in chunks])


def test_a_digest_changes_with_any_byte_and_with_the_length(tmp_path, small_chunks):
    file = tmp_path / "file"
    content = bytearray(os.urandom(3 * CHUNK + 5))
    seen = set()
    for position in (None, 0, CHUNK - 1, CHUNK, 3 * CHUNK + 4):
        changed = bytearray(content)
        if position is not None:
            changed[position] ^= 1
        file.write_bytes(changed)
        seen.add(file_digest(file))
    file.write_bytes(content[: 3 * CHUNK])
    seen.add(file_digest(file))
    file.write_bytes(b"")
    seen.add(file_digest(file))
    assert len(seen) == 7


def test_only_so_much_is_read_ahead(folder, small_chunks):
    with ShardedWeights(folder) as weights:
        stream = ReadAhead(weights, weights.names, CPU)
        ahead = [sum(t.nbytes for t in stream._tensors.values()) for _ in stream]
        largest = max(weights.stored(name).stop - weights.stored(name).start for name in weights.names)
    assert max(ahead) <= 2 * 3 * CHUNK + largest
    assert max(ahead) >= CHUNK, "nothing was read ahead"


def test_a_file_cut_short_while_it_is_read_is_named(folder, small_chunks):
    with ShardedWeights(folder) as weights:
        stream = iter(ReadAhead(weights, weights.names, CPU))
        next(stream)
        last = weights.files[-1]
        os.truncate(last, last.stat().st_size - 700)
        with pytest.raises(ValueError, match=f"{last.name}: became shorter while it was read"):
            list(stream)


def test_a_file_that_cannot_be_read_is_named(folder, small_chunks, monkeypatch):
    def broken(*arguments):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    with (
        ShardedWeights(folder) as weights,
        pytest.raises(ValueError, match=r"safetensors: cannot be read: Input/output error"),
    ):
        list(ReadAhead(weights, weights.names, CPU))


def test_threads_and_files_are_gone_when_reading_stops_early(folder, small_chunks):
    opened = len(os.listdir("/proc/self/fd"))
    with ShardedWeights(folder) as weights:
        held = len(os.listdir("/proc/self/fd"))
        stream = iter(ReadAhead(weights, weights.names, CPU))
        next(stream)
        stream.close()
        assert len(os.listdir("/proc/self/fd")) == held
    assert len(os.listdir("/proc/self/fd")) == opened


def test_a_dtype_we_do_not_know_is_named(tmp_path):
    save_file({"odd": torch.zeros(4, dtype=torch.complex64)}, tmp_path / WEIGHTS_FILE)
    with pytest.raises(ValueError, match=f"{WEIGHTS_FILE}: odd: has dtype C64, accepted: I64"):
        ShardedWeights(tmp_path)


def test_files_are_written_as_safetensors_writes_them(tensors, tmp_path):
    plain = tensors | {
        "trés\"odd'": torch.ones(3),
        "half": torch.ones(3, 2).half(),
        "n": torch.ones(2).long(),
    }
    write_weights([plain], tmp_path, max_shard_bytes=10**9)
    save_file(plain, tmp_path / "expected", {"format": "pt"})
    assert (tmp_path / WEIGHTS_FILE).read_bytes() == (tmp_path / "expected").read_bytes()
    assert load_file(tmp_path / WEIGHTS_FILE).keys() == plain.keys()


@pytest.mark.gpu
def test_the_gpu_gets_the_same_bytes_while_it_computes(folder, tensors, small_chunks):
    device = torch.device("cuda")
    with ShardedWeights(folder) as weights:
        sums = {}
        for name, tensor in ReadAhead(weights, weights.names, device, on_host=["number"]):
            assert tensor.device.type == ("cpu" if name == "number" else "cuda")
            # Memory is given back at once, for the next tensors to land in while this is still queued.
            sums[name] = tensor.to(torch.float64).cumsum(-1).sum() if tensor.numel() else torch.zeros(())
            del tensor
        for name, total in sums.items():
            expected = tensors[name].to(torch.float64)
            if expected.numel():
                assert torch.allclose(total.cpu(), expected.cumsum(-1).sum()), name
