"""Write ``ssp_fused/data/digits.bin.gz`` from scikit-learn's copy of the UCI handwritten digits.

The 1,797 images are the test part of "Optical Recognition of Handwritten Digits" (E. Alpaydin and
C. Kaynak, UCI Machine Learning Repository, 1998, doi 10.24432/C50P49, CC BY 4.0), 8x8 pixels with
values 0 to 16. Each sample is 64 pixel bytes in row order and one label byte.

    pip install scikit-learn && python tools/make_digits.py

The printed SHA-256 of the uncompressed bytes is the one pinned in ``ssp_fused/data/digits.py``.
"""

from __future__ import annotations

import gzip
import hashlib
import io
from pathlib import Path

TARGET = Path(__file__).resolve().parent.parent / "ssp_fused" / "data" / "digits.bin.gz"


def main() -> None:
    """Write the file and print its digest."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    payload = b"".join(
        bytes(int(pixel) for pixel in row) + bytes([int(label)])
        for row, label in zip(bunch.data, bunch.target, strict=True)
    )
    buffer = io.BytesIO()
    # Without a name and with a zero time, the same bytes come out of every run.
    with gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=buffer, mtime=0) as file:
        file.write(payload)
    TARGET.write_bytes(buffer.getvalue())
    print(f"{TARGET}: {len(payload) // 65} images, {len(buffer.getvalue())} bytes")
    print(f"SHA-256 of the uncompressed bytes: {hashlib.sha256(payload).hexdigest()}")


if __name__ == "__main__":
    main()
