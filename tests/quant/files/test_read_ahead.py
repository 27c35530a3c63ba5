"""Tests reading weights ahead in chunks: complete tensors, bounded memory and digests; and writing weights."""

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
    generator = torch.Generator().manual_seed(0)
    random_tensors = {
        f"layer.{n}.weight": torch.randn(n, 37, generator=generator).bfloat16() for n in range(1, 40)
    }
    return random_tensors | {
        "empty": torch.empty(0, 4),
        "number": torch.tensor(3.0),
        "codes": torch.arange(1999, dtype=torch.int32).to(torch.uint8),
        "mask": torch.rand(5, 7, generator=generator) > 0.5,
    }


@pytest.fixture(params=[10**9, 10_000])
def folder(request, tensors, tmp_path):
    write_weights(
        ({name: tensor} for name, tensor in tensors.items()), tmp_path, max_shard_bytes=request.param
    )
    assert (tmp_path / INDEX_FILE).exists() == (request.param < 10**9)
    return tmp_path


def test_all_tensors_arrive_complete_in_file_order(folder, tensors, small_chunks):
    with ShardedWeights(folder) as weights:
        read = list(ReadAhead(weights, weights.names, CPU))
        assert [name for name, _ in read] == weights.names
    for name, tensor in read:
        assert tensor.dtype == tensors[name].dtype
        assert tensor.shape == tensors[name].shape
        assert torch.equal(tensor, tensors[name]), name


def test_only_requested_tensors_are_read(folder, tensors, small_chunks, monkeypatch):
    reads = []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *arguments: reads.append(arguments) or preadv(*arguments))
    with ShardedWeights(folder) as weights:
        ((name, tensor),) = ReadAhead(weights, ["layer.39.weight"], CPU)
    assert torch.equal(tensor, tensors[name])
    assert len(reads) <= tensor.nbytes // CHUNK + 2


def test_digests_equal_those_of_the_files(folder, small_chunks):
    found_digests = {}
    with ShardedWeights(folder) as weights:
        list(ReadAhead(weights, ["number"], CPU, on_file=found_digests.__setitem__))
        assert found_digests == {path: file_digest(path) for path in weights.files}
    for path, digest in found_digests.items():
        data = path.read_bytes()
        chunks = [data[start : start + CHUNK] for start in range(0, len(data), CHUNK)]
        assert digest == combined([hashlib.sha256(chunk).digest() for chunk in chunks])


def test_digest_depends_on_every_byte_and_the_length(tmp_path, small_chunks):
    file = tmp_path / "file"
    content = bytearray(os.urandom(3 * CHUNK + 5))
    all_digests = set()
    for position in (None, 0, CHUNK - 1, CHUNK, 3 * CHUNK + 4):
        changed = bytearray(content)
        if position is not None:
            changed[position] ^= 1
        file.write_bytes(changed)
        all_digests.add(file_digest(file))
    file.write_bytes(content[: 3 * CHUNK])
    all_digests.add(file_digest(file))
    file.write_bytes(b"")
    all_digests.add(file_digest(file))
    assert len(all_digests) == 7


def test_memory_read_ahead_is_bounded(folder, small_chunks):
    with ShardedWeights(folder) as weights:
        stream = ReadAhead(weights, weights.names, CPU)
        bytes_in_flight = [sum(t.nbytes for t in stream._tensors.values()) for _ in stream]
        largest = max(weights.stored(name).stop - weights.stored(name).start for name in weights.names)
    assert max(bytes_in_flight) <= 2 * 3 * CHUNK + largest
    assert max(bytes_in_flight) >= CHUNK, "nothing was read ahead"


def test_error_names_a_file_truncated_during_reading(folder, small_chunks):
    with ShardedWeights(folder) as weights:
        stream = iter(ReadAhead(weights, weights.names, CPU))
        next(stream)
        last = weights.files[-1]
        os.truncate(last, last.stat().st_size - 700)
        with pytest.raises(ValueError, match=f"{last.name}: .*shorter"):
            list(stream)


def test_error_names_a_file_that_cannot_be_read(folder, small_chunks, monkeypatch):
    def broken(*arguments):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    with (
        ShardedWeights(folder) as weights,
        pytest.raises(ValueError, match=r"safetensors: .*: Input/output error"),
    ):
        list(ReadAhead(weights, weights.names, CPU))


def test_files_are_closed_when_reading_stops_early(folder, small_chunks):
    open_before = len(os.listdir("/proc/self/fd"))
    with ShardedWeights(folder) as weights:
        open_with_weights = len(os.listdir("/proc/self/fd"))
        stream = iter(ReadAhead(weights, weights.names, CPU))
        next(stream)
        stream.close()
        assert len(os.listdir("/proc/self/fd")) == open_with_weights
    assert len(os.listdir("/proc/self/fd")) == open_before


def test_unknown_dtype_is_rejected_with_its_name(tmp_path):
    save_file({"odd": torch.zeros(4, dtype=torch.complex64)}, tmp_path / WEIGHTS_FILE)
    with pytest.raises(ValueError, match=rf"{WEIGHTS_FILE}: odd: .*\bC64\b.*\bI64\b"):
        ShardedWeights(tmp_path)


def test_written_files_equal_those_of_safetensors(tensors, tmp_path):
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
def test_gpu_receives_the_same_bytes_while_it_computes(folder, tensors, small_chunks):
    device = torch.device("cuda")
    with ShardedWeights(folder) as weights:
        sums = {}
        for name, tensor in ReadAhead(weights, weights.names, device, on_host=["number"]):
            assert tensor.device.type == ("cpu" if name == "number" else "cuda")
            # Frees the memory at once, so that the next tensors are copied into it while this work is still queued.
            sums[name] = tensor.to(torch.float64).cumsum(-1).sum() if tensor.numel() else torch.zeros(())
            del tensor
        for name, total in sums.items():
            expected = tensors[name].to(torch.float64)
            if expected.numel():
                assert torch.allclose(total.cpu(), expected.cumsum(-1).sum()), name
