#!/usr/bin/env bash
# Compile the kernel test: build.sh FOLDER [FLAGS...]; CXX names the compiler (c++ if unset). The
# architecture is the compiler's own. PROGRAM=fuzz compiles the fuzz run instead. Prints its path.
set -euo pipefail
folder=$1 && shift
cxx=${CXX:-c++}
program=${PROGRAM:-kernel_test}
[ "$program" = fuzz ] && tests=(fuzz) || tests=(kernel_test model_test)
here=$(cd "$(dirname "$0")" && pwd)
csrc=$here/../../runtime/engine/native/csrc
flags=(-std=c++17 -O2 -fwrapv -g1 -Wall -Wextra -Wno-unknown-warning-option -Wno-maybe-uninitialized
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
    for file in "${tests[@]/#/$here/}" "$csrc"/{pool,json,memory,pack,bundle,embedding,adapter,api}; do
        echo "$cxx ${flags[*]} -c $file.cpp -o $folder/$(basename "$file").o"
    done
}
commands | xargs -P "$(nproc 2>/dev/null || echo 2)" -I{} sh -c '{}'
"$cxx" "${flags[@]}" "$folder"/*.o -o "$folder/$program"
echo "$folder/$program"
