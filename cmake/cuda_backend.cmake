# The CUDA backend: cuda/**. Two generated sources for each format pair (decode and append, prefill), one for each format (codec).
#
#   QATTN_CUDA=AUTO|ON|OFF            AUTO builds it where nvcc is found; ON fails without one
#   QATTN_CUDA_RELEASE=ON             code for every supported architecture, and PTX for newer ones
#   CMAKE_CUDA_ARCHITECTURES=...      exactly these; the default is the GPU of this machine, else 90
option(QATTN_CUDA_RELEASE "Compile CUDA code for every supported architecture" OFF)
set(QATTN_CUDA_RELEASE_ARCHITECTURES 80-real 86-real 89-real 90-real 100-real 120)
set(QATTN_CUDA_ENABLED OFF)
if(NOT QATTN_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "quantattn: QATTN_CUDA must be AUTO, ON or OFF, got ${QATTN_CUDA}")
endif()
if(QATTN_CUDA STREQUAL OFF)
  return()
endif()

include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(QATTN_CUDA STREQUAL ON)
    message(FATAL_ERROR "quantattn: QATTN_CUDA=ON needs nvcc, and none was found; put it on the PATH or set CMAKE_CUDA_COMPILER")
  endif()
  return()
endif()

if(QATTN_CUDA_RELEASE)
  set(CMAKE_CUDA_ARCHITECTURES ${QATTN_CUDA_RELEASE_ARCHITECTURES})
elseif(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  execute_process(COMMAND nvidia-smi -L RESULT_VARIABLE no_gpu OUTPUT_QUIET ERROR_QUIET)
  if(no_gpu)
    set(CMAKE_CUDA_ARCHITECTURES 90)
  else()
    set(CMAKE_CUDA_ARCHITECTURES native)
  endif()
endif()
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
set(QATTN_CUDA_ENABLED ON)
list(APPEND QATTN_BACKENDS cuda)

set(cuda_sources cuda/append/launch.cu cuda/backend.cc cuda/codec/launch.cu cuda/decode/decode_launch.cc cuda/decode/pairs.cc cuda/decode/plan.cc
                 cuda/device.cc cuda/hybrid/hybrid.cc cuda/merge/merge.cu cuda/prefill/plan.cc)
set(table_rows "")
foreach(pair IN LISTS QATTN_PAIRS)
  string(REPLACE "/" ";" types ${pair})
  list(GET types 0 QATTN_K_TYPE)
  list(GET types 1 QATTN_V_TYPE)
  set(QATTN_K_NAME ${QATTN_FORMAT_NAME_${QATTN_K_TYPE}})
  set(QATTN_V_NAME ${QATTN_FORMAT_NAME_${QATTN_V_TYPE}})
  set(QATTN_TABLE_ID pair_${QATTN_K_NAME}_${QATTN_V_NAME})
  foreach(kernels decode prefill)
    set(source ${CMAKE_CURRENT_BINARY_DIR}/generated/cuda/${kernels}_${QATTN_TABLE_ID}.cu)
    configure_file(cuda/${kernels}/pair.cu.in ${source} @ONLY)
    list(APPEND cuda_sources ${source})
  endforeach()
  string(APPEND table_rows "QATTN_CUDA_PAIR(${QATTN_TABLE_ID})\n")
endforeach()
file(CONFIGURE OUTPUT generated/cuda_pairs.def CONTENT "${table_rows}" @ONLY)

set(table_rows "")
foreach(QATTN_FORMAT_TYPE IN LISTS QATTN_FORMATS)
  set(QATTN_FORMAT_NAME ${QATTN_FORMAT_NAME_${QATTN_FORMAT_TYPE}})
  set(QATTN_TABLE_ID codec_${QATTN_FORMAT_NAME})
  set(source ${CMAKE_CURRENT_BINARY_DIR}/generated/cuda/${QATTN_TABLE_ID}.cu)
  configure_file(cuda/codec/format.cu.in ${source} @ONLY)
  list(APPEND cuda_sources ${source})
  string(APPEND table_rows "QATTN_CUDA_FORMAT(${QATTN_TABLE_ID})\n")
endforeach()
file(CONFIGURE OUTPUT generated/cuda_formats.def CONTENT "${table_rows}" @ONLY)

target_sources(quantattn PRIVATE ${cuda_sources})
target_include_directories(quantattn PRIVATE cuda)
target_compile_options(quantattn PRIVATE
  $<$<COMPILE_LANGUAGE:CUDA>:-Xfatbin=-compress-all -Xcompiler=-Wall,-Wextra>
  $<$<AND:$<COMPILE_LANGUAGE:CUDA>,$<BOOL:${QATTN_WARNINGS_AS_ERRORS}>>:-Werror=all-warnings>)
set_target_properties(quantattn PROPERTIES
  CUDA_ARCHITECTURES "${CMAKE_CUDA_ARCHITECTURES}" CUDA_STANDARD 20 CUDA_STANDARD_REQUIRED ON CUDA_VISIBILITY_PRESET hidden
  CUDA_RUNTIME_LIBRARY Static)
target_link_libraries(quantattn PRIVATE CUDA::cudart_static)
