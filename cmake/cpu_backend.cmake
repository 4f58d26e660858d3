# CPU backend: kernels written once, compiled once per instruction set. Most capable first.
# A new instruction set is one line here, one header cpp/cpu/isa/<name>.h and its check in cpp/cpu/cpu_features.cc.
set(isas scalar)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  set(isas avx512bf16 avx512 avx2 scalar)
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64)$")
  set(isas neon scalar)
endif()
set(isa_options_avx512 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mavx512vbmi -mavx2 -mfma -mf16c -mprefer-vector-width=512)
set(isa_options_avx512bf16 ${isa_options_avx512} -mavx512bf16)
set(isa_options_avx2 -mavx2 -mfma -mf16c)
set(isa_options_neon "")
set(isa_options_scalar "")
set(maybe_uninitialized "")
if(CMAKE_CXX_COMPILER_ID STREQUAL GNU)
  set(maybe_uninitialized ";-Wno-maybe-uninitialized")  # GCC's own intrinsics read a register that nobody set
endif()

target_sources(quantattn PRIVATE
  cpp/cpu/attention.cc cpp/cpu/attention_batch.cc cpp/cpu/attention_plan.cc cpp/cpu/codec.cc cpp/cpu/cpu_backend.cc
  cpp/cpu/cpu_features.cc cpp/cpu/isa_table.cc cpp/cpu/item_runner.cc cpp/cpu/merge.cc cpp/cpu/openmp_team.cc
  cpp/cpu/schedule.cc cpp/cpu/thread_pool.cc cpp/cpu/tile_reader.cc)

set(QATTN_FORMAT_NAME_Float32 float32)  # fresh keys and values, beside the formats of caches
set(ISA_DECLARATIONS "")
set(ISA_ROWS "")
foreach(ISA IN LISTS isas)
  set(sources ${CMAKE_CURRENT_BINARY_DIR}/generated/cpu_${ISA}.cc)
  configure_file(cpp/cpu/isa_stages.cc.in ${sources} @ONLY)
  string(APPEND ISA_DECLARATIONS "bool has_${ISA}();\nextern const IsaStages kIsaStages_${ISA};\n")
  set(formats "")
  set(codecs "")
  set(codec_sources "")
  foreach(FORMAT_TYPE IN LISTS QATTN_FORMATS ITEMS Float32)
    set(FORMAT_NAME ${QATTN_FORMAT_NAME_${FORMAT_TYPE}})
    set(source ${CMAKE_CURRENT_BINARY_DIR}/generated/cpu_${ISA}_${FORMAT_NAME}.cc)
    configure_file(cpp/cpu/format_stages.cc.in ${source} @ONLY)
    list(APPEND sources ${source})
    string(APPEND ISA_DECLARATIONS "extern const FormatStages kFormatStages_${ISA}_${FORMAT_TYPE};\n")
    string(APPEND formats "&kFormatStages_${ISA}_${FORMAT_TYPE}, ")
  endforeach()
  foreach(FORMAT_TYPE IN LISTS QATTN_FORMATS)
    set(FORMAT_NAME ${QATTN_FORMAT_NAME_${FORMAT_TYPE}})
    set(source ${CMAKE_CURRENT_BINARY_DIR}/generated/cpu_${ISA}_${FORMAT_NAME}_codec.cc)
    configure_file(cpp/cpu/format_codec.cc.in ${source} @ONLY)
    list(APPEND codec_sources ${source})
    string(APPEND ISA_DECLARATIONS "extern const FormatCodec kFormatCodec_${ISA}_${FORMAT_TYPE};\n")
    string(APPEND codecs "&kFormatCodec_${ISA}_${FORMAT_TYPE}, ")
  endforeach()
  string(APPEND ISA_ROWS "    {\"${ISA}\", has_${ISA}, &kIsaStages_${ISA}, {${formats}}, {${codecs}}},\n")
  # Codes must be the same bits whatever the flags: no contraction of x / scale and its surroundings.
  set_source_files_properties(${codec_sources} PROPERTIES COMPILE_OPTIONS "${isa_options_${ISA}};-ffp-contract=off;-Wno-psabi;-Wno-uninitialized${maybe_uninitialized}")
  # Vectors cross no function boundary, so the ABI of wide vectors does not matter.
  set_source_files_properties(${sources} PROPERTIES COMPILE_OPTIONS "${isa_options_${ISA}};-ffp-contract=fast;-Wno-psabi;-Wno-uninitialized${maybe_uninitialized}")
  target_sources(quantattn PRIVATE ${sources} ${codec_sources})
endforeach()
configure_file(cpp/cpu/isa_table.cc.in generated/cpu_isa_table.cc @ONLY)
target_sources(quantattn PRIVATE ${CMAKE_CURRENT_BINARY_DIR}/generated/cpu_isa_table.cc)
list(APPEND QATTN_BACKENDS cpu)
