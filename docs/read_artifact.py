"""Read deltakeeper artifacts with numpy alone, as artifact.md says; it checks the base, and trusts the artifact."""

import hashlib
import json
from pathlib import Path

import numpy as np

TYPES = {"F64": "f8", "F32": "f4", "F16": "f2", "BF16": "u2", "I64": "i8", "I32": "i4", "I16": "i2"}
TYPES |= {"I8": "i1", "U8": "u1", "BOOL": "?"}


def load(folder, stem):  # (name, (dtype, array)) of a safetensors file or its shards; bfloat16 as uint16
    for raw in (np.memmap(file, "u1", "r") for file in Path(folder).glob(f"{stem}*.safetensors")):
        start = 8 + int(raw[:8].view("u8")[0])
        for name, e in json.loads(bytes(raw[8:start])).items():
            if name != "__metadata__":
                data = raw[start:][slice(*e["data_offsets"])].view(TYPES[e["dtype"]])
                yield name, (e["dtype"], data.reshape(e["shape"]))


def widen(dtype, array):  # half precision to float32
    return (array.astype("u4") << 16).view("f4") if dtype == "BF16" else array.astype("f4") if dtype == "F16" else array


def unpack(words, bits, count):  # int32 (rows, n) -> float32 (rows, count)
    stream = np.unpackbits(np.ascontiguousarray(words).view("u1"), axis=1, count=count * bits, bitorder="little")
    return np.packbits(stream.reshape(len(words), count, bits), axis=2, bitorder="little")[:, :, 0].astype("f4")


def mask(s, shape, part):  # which entries of a sparse term are kept, bool (out, in)
    found, kept, low = np.zeros(shape, bool), shape[1] // 4 * 2 + min(2, shape[1] % 4), 0xFFFFFFFF
    if s["mask"] == "bits":
        found = unpack(part("delta_bitmask"), 1, shape[1]) == 1
    elif s["mask"] == "two_four":
        np.put_along_axis(found, unpack(part("delta_indices"), 2, kept).astype(int) + np.arange(kept) // 2 * 4, True, 1)
    elif s["mask"] == "gaps":
        for row, gaps in enumerate(np.split(part("delta_gaps").astype(int), np.cumsum(part("delta_row_bytes"))[:-1])):
            found[row, (np.cumsum(gaps + (gaps < 255)) - 1)[gaps < 255]] = True
    else:  # seed: Philox4x32-10
        key = hashlib.sha256(s["seed"].to_bytes(8, "little") + s["tensor"].encode()).digest()[:8]
        count, key = np.arange(-(-found.size // 4), dtype="u8"), np.frombuffer(key, "u4").astype("u8")
        x = [count & low, count >> 32, 0 * count, 0 * count]
        for i in range(10):
            k, a, b = (key + i * np.array([0x9E3779B9, 0xBB67AE85], "u8")) & low, x[0] * 0xD2511F53, x[2] * 0xCD9E8D57
            x = [(b >> 32) ^ x[1] ^ k[0], b & low, (a >> 32) ^ x[3] ^ k[1], a & low]
        keep = np.float64(part("delta_keep")[:, None] if s["keep"] == "row" else s["keep"])
        found = np.stack(x, axis=1).reshape(-1)[: found.size].reshape(shape) < np.floor(keep * 2**32)
    return found


def dense(layout, s, shape, part):  # one term, float32; part(suffix) gives its payload
    found, bits, at = np.zeros(shape, "f4"), s.get("bits", 1), np.arange(shape[1]) // (s.get("group") or shape[1])
    if layout == "dense":
        found = part("delta")
    elif layout == "signs":
        present = unpack(part("delta_nonzero"), 1, shape[1]) if s["zero"] == "zero" else 1
        for k in range(s["planes"]):
            found += (2 * unpack(part(f"delta_packed.{k}"), 1, shape[1]) - 1) * part(f"delta_scale.{k}") * present
    elif layout == "grouped_int":
        q, zeros = unpack(part("delta_packed"), bits, shape[1]), s["zero_point"] == "group"
        q = q - part("delta_zero_point")[:, at] if zeros else 2 * q - 1 if bits == 1 else q - 2 ** (bits - 1)
        found = q * (part("delta_scale") * part("delta_gain"))[:, at]
    elif layout == "sparse":
        q = part("delta_values") if "float" in s["values"] else unpack(part("delta_packed")[None], bits, s["nnz"])[0]
        kept, q = mask(s, shape, part), 2 * q - 1 if s["values"] == "sign" else q - s.get("zero_point", 0)
        found[kept] = q * np.broadcast_to(part("delta_gain").reshape(-1, 1), shape)[kept]
    else:  # lowrank
        sides = (s.get("left"), (s["rank"], shape[0]), "delta_U."), (s.get("right"), (s["rank"], shape[1]), "delta_V.")
        u, v = (t and dense(t["layout"], t["settings"], size, lambda x, p=p: part(p + x)) for t, size, p in sides)
        found = (part("delta_U") @ part("delta_V") if u is None else u.T @ v) * part("delta_gain")
    return found


def read(base, delta):  # yields (name, dtype, array) for every tensor but the aliases
    manifest = json.loads(Path(delta, "delta_config.json").read_text())
    weights, payload = dict(load(base, "model")), dict(load(delta, "delta_model"))
    for name, r in sorted(item for item in manifest["tensors"].items() if item[1]["encoding"] != "tied"):
        (dtype, found), origin, kind, sums = weights.get(r["base_name"], ("", None)), r["base_name"], r["dtype"], {}
        if found is not None:
            leaf = f"{origin}\0{dtype}\0{','.join(map(str, found.shape))}\0".encode() + found.tobytes()
            assert hashlib.sha256(leaf).hexdigest() == manifest["base"]["leaves"][origin], f"{origin}: another base"
        if any(t["settings"].get("encoding") == "value" for t in r["terms"]):
            found = payload[f"{name}::0.delta"][1]
        elif r["terms"] or dtype != kind:
            rows, step = (r["shape"][0] - r["added_rows"], *r["shape"][1:]), -1 if r["transposed"] else 1
            for i, t in enumerate(r["terms"]):
                size = rows[::step] if t["slice"] is None else rows[1:]
                term = dense(t["layout"], t["settings"], size, lambda x, at=f"{name}::{i}.": widen(*payload[at + x]))
                sums[t["slice"]] = sums.get(t["slice"], np.float32(-0.0)) + (term.T if step < 0 else term)
            total = np.stack([sums[k] for k in sorted(sums)]) if None not in sums and sums else sums.get(None, -0.0)
            bits = np.add(total, widen(dtype, found[: rows[0]]), dtype="f4").view("u4")
            near = bits + 0x7FFF + (bits >> 16 & 1) >> 16 if kind == "BF16" else bits.view("f4")  # ties to even
            found = np.concatenate([near.astype(TYPES[kind]), payload.get(f"{name}::added_rows", ("", found[:0]))[1]])
        yield name, kind, found
