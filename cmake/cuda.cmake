# Adds the CUDA kernels to target _C. Sets cuda_version, cuda_archs (machine code for these) and cuda_ptx.
#
#   csrc/cuda/*.cpp       host code
#   csrc/cuda/*_sm90.cu   for 90a alone: its instructions exist on no other architecture, older or newer
#   csrc/cuda/*_sm80.cu   for every architecture but 90a
#   csrc/cuda/*.cu        the others: for every architecture
#
# The host code may use what HUBERT_FAST_WITH_SM90 and HUBERT_FAST_WITH_SM80 say is there.

# Architectures are given to each file by itself below.
set(CMAKE_CUDA_ARCHITECTURES OFF)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_EXTENSIONS OFF)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
if(NOT EXISTS "${HUBERT_FAST_CUTLASS_INCLUDE}/cutlass/cutlass.h")
  message(FATAL_ERROR "HUBERT_FAST_CUTLASS_INCLUDE is '${HUBERT_FAST_CUTLASS_INCLUDE}': it must hold cutlass/cutlass.h")
endif()

set(cuda_version ${CMAKE_CUDA_COMPILER_VERSION})
set(cuda_archs ${HUBERT_FAST_CUDA_ARCHS})
set(all_code)
set(sm80_code)
set(sm90_code)
foreach(arch IN LISTS cuda_archs)
  set(code "--generate-code=arch=compute_${arch},code=sm_${arch}")
  list(APPEND all_code ${code})
  if(arch STREQUAL "90a")
    set(sm90_code ${code})
  else()
    list(APPEND sm80_code ${code})
  endif()
  # PTX with a suffix (90a) runs on no newer GPU, so that of the newest architecture without one is kept. PTX of an
  # architecture whose machine code is made anyway costs no compile time.
  if(arch MATCHES "^[0-9]+$" AND (cuda_ptx STREQUAL "" OR arch GREATER cuda_ptx))
    set(cuda_ptx ${arch})
  endif()
endforeach()
if(cuda_ptx STREQUAL "")
  # Only architectures with a suffix: newer GPUs get PTX of the first, without its suffix.
  string(REGEX MATCH "^[0-9]+" cuda_ptx "${cuda_archs}")
endif()
set(ptx "--generate-code=arch=compute_${cuda_ptx},code=compute_${cuda_ptx}")
list(APPEND all_code ${ptx})
if(sm80_code)
  list(APPEND sm80_code ${ptx})
endif()

file(GLOB cuda_host_sources CONFIGURE_DEPENDS "csrc/cuda/*.cpp")
file(GLOB cuda_sources CONFIGURE_DEPENDS "csrc/cuda/*.cu")
set(cuda_definitions HUBERT_FAST_WITH_CUDA)
set(kernels)
foreach(source IN LISTS cuda_sources)
  set(code ${all_code})
  if(source MATCHES "_sm90\\.cu$")
    set(code ${sm90_code})
  elseif(source MATCHES "_sm80\\.cu$")
    set(code ${sm80_code})
  endif()
  if(code)
    set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS "${code}")
    list(APPEND kernels ${source})
  endif()
endforeach()
if(sm90_code)
  list(APPEND cuda_definitions HUBERT_FAST_WITH_SM90)
endif()
if(sm80_code)
  list(APPEND cuda_definitions HUBERT_FAST_WITH_SM80)
endif()

# A library of their own, so that a pool can limit how many are compiled at a time.
add_library(cuda_kernels OBJECT ${kernels})
set_property(GLOBAL APPEND PROPERTY JOB_POOLS cuda=${HUBERT_FAST_CUDA_JOBS})
set_property(TARGET cuda_kernels PROPERTY JOB_POOL_COMPILE cuda)
target_compile_definitions(cuda_kernels PRIVATE ${cuda_definitions})
target_include_directories(cuda_kernels PRIVATE csrc)
target_include_directories(cuda_kernels SYSTEM PRIVATE "${HUBERT_FAST_CUTLASS_INCLUDE}")
# ptxas says which kernels spill; setup.py keeps that for tests/csrc/cuda/test_check_ptxas.py.
target_compile_options(cuda_kernels PRIVATE --expt-relaxed-constexpr -Xptxas=-v -Xcompiler=-Wall,-Wno-unknown-pragmas)

target_sources(_C PRIVATE ${cuda_host_sources} $<TARGET_OBJECTS:cuda_kernels>)
target_compile_definitions(_C PRIVATE ${cuda_definitions})
target_include_directories(_C SYSTEM PRIVATE "${HUBERT_FAST_CUTLASS_INCLUDE}")
# The static runtime, so that one wheel works beside any torch. The driver is found at run time (cudaGetDriverEntryPoint).
target_link_libraries(_C PRIVATE CUDA::cudart_static)
