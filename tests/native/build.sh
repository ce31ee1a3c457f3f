#!/usr/bin/env bash
# Compile the kernel test: build.sh FOLDER [FLAGS...]; CXX names the compiler (c++ if unset). The
# architecture is the compiler's own. Prints the path of the program.
set -euo pipefail
folder=$1 && shift
cxx=${CXX:-c++}
here=$(cd "$(dirname "$0")" && pwd)
csrc=$here/../../runtime/engine/native/csrc
flags=(-std=c++17 -O2 -g1 -Wall -Wextra -Wno-unknown-warning-option -Wno-maybe-uninitialized
    -Wno-uninitialized -pthread "-I$csrc" "-I$here" "$@")
avx2=(-mavx2 -mfma -mf16c)
unit() { # name, table, flags
    local name=$1 table=$2 && shift 2
    echo "$cxx ${flags[*]} $* -DSIMD=$name -DTABLE=$table -c $here/unit.cpp -o $folder/unit_$name.o"
}
commands() {
    unit scalar SCALAR
    case $($cxx -dumpmachine) in
    x86_64*)
        unit avx512 AVX512 "${avx2[@]}" -mavx512{f,bw,vl,dq,vnni}
        unit avx2 AVX2 "${avx2[@]}"
        ;;
    aarch64* | arm64*) unit neon NEON -march=armv8.2-a+dotprod+fp16 ;;
    esac
    for file in "$here"/{kernel_test,model_test}.cpp "$csrc"/{pool,json,memory,pack,bundle,adapter,api}.cpp; do
        echo "$cxx ${flags[*]} -c $file -o $folder/$(basename "$file" .cpp).o"
    done
}
commands | xargs -P "$(nproc 2>/dev/null || echo 2)" -I{} sh -c '{}'
"$cxx" "${flags[@]}" "$folder"/*.o -o "$folder/kernel_test"
echo "$folder/kernel_test"
