from tests.file.vectors import FOLDER, write

for path in write(FOLDER):
    print(f"{path.name}: {path.stat().st_size:,} bytes")
