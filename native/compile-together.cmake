# Which files are compiled as one unit. What the standard library's headers and templates cost, <regex> above all, is
# most of the time of small files, and is then paid once. A file that upstream adds is compiled by itself until a
# pattern here matches it.

# Sources of the target whose paths match one of the patterns, in the order of the patterns, at_most files a unit.
function(compile_together target name options at_most)
    get_target_property(folder ${target} SOURCE_DIR)
    get_target_property(sources ${target} SOURCES)
    set(paths)
    foreach (source ${sources})
        get_filename_component(path ${source} ABSOLUTE BASE_DIR ${folder})
        list(APPEND paths ${path})
    endforeach()
    set(files)
    foreach (pattern ${ARGN})
        set(matching ${paths})
        list(FILTER matching INCLUDE REGEX "/${pattern}\\.cpp$")
        list(APPEND files ${matching})
    endforeach()
    set(number 0)
    while (files)
        list(SUBLIST files 0 ${at_most} part)
        list(REMOVE_ITEM files ${part})
        set(text "")
        foreach (path ${part})
            # no path of this machine: a compiler cache then knows the unit in another checkout
            file(RELATIVE_PATH name_in_folder ${folder} ${path})
            string(APPEND text "#include \"${name_in_folder}\"\n")
        endforeach()
        math(EXPR number "${number} + 1")
        set(unit ${CMAKE_CURRENT_BINARY_DIR}/together/${target}-${name}-${number}.cpp)
        file(CONFIGURE OUTPUT ${unit} CONTENT "${text}" @ONLY)
        set_source_files_properties(${part} TARGET_DIRECTORY ${target} PROPERTIES HEADER_FILE_ONLY ON)
        set_source_files_properties(${unit} TARGET_DIRECTORY ${target} PROPERTIES COMPILE_OPTIONS "${options}")
        target_sources(${target} PRIVATE ${unit})
    endwhile()
endfunction()

if (NOT MSVC)
    # what runs once a model or once a graph, and what decodes images and sounds
    set(not_hot $<$<CONFIG:Release>:-O1>)
    set(less_hot $<$<CONFIG:Release>:-O2>)
endif()

# What is hot comes first: of a template that several units instantiate, the linker takes the first.
set_target_properties(llama PROPERTIES UNITY_BUILD OFF)
compile_together(llama text "" 99 src/llama-grammar src/llama-quant src/llama-sampler src/llama-vocab src/unicode-data
    src/unicode)
compile_together(llama memory "" 99 src/llama-kv-cache[^/]* src/llama-memory[^/]*)
compile_together(llama context "" 99 src/llama-batch src/llama-context src/llama-graph)
# the loader before the others: it specialises what they instantiate
compile_together(llama model "${not_hot}" 99 src/llama-model-loader src/llama-model-saver src/llama-model
    src/llama-adapter src/llama-arch src/llama-chat src/llama-cparams src/llama-hparams src/llama-impl src/llama-io
    src/llama)
compile_together(llama models "${not_hot}" 40 src/models/.*)
compile_together(mtmd media "" 99 mtmd/mtmd-audio mtmd/mtmd-image mtmd/mtmd)
compile_together(mtmd helper "${less_hot}" 99 mtmd/mtmd-helper mtmd/mtmd-helper-gen)
compile_together(mtmd clip "${not_hot}" 99 mtmd/clip mtmd/models/.*)
