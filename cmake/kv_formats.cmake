# Reads the KV format table once. Backends generate one source for each row (or pair of rows) from a template.
set(QATTN_FORMAT_TABLE ${CMAKE_CURRENT_SOURCE_DIR}/cpp/include/quantattn/kv_formats.def)
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${QATTN_FORMAT_TABLE})

# QATTN_FORMATS: C++ types. QATTN_FORMAT_NAME_<Type>: the public name. QATTN_PAIRS: "KType/VType", same-format pairs first.
set(QATTN_FORMATS "")
set(QATTN_PAIRS "")
file(STRINGS ${QATTN_FORMAT_TABLE} rows REGEX "^QATTN_KV_FORMAT")
foreach(row IN LISTS rows)
  string(REGEX MATCH "\\(([A-Za-z0-9]+), *\"([a-z0-9_]+)\"" matched "${row}")
  list(APPEND QATTN_FORMATS ${CMAKE_MATCH_1})
  set(QATTN_FORMAT_NAME_${CMAKE_MATCH_1} ${CMAKE_MATCH_2})
  list(APPEND QATTN_PAIRS ${CMAKE_MATCH_1}/${CMAKE_MATCH_1})
endforeach()
file(STRINGS ${QATTN_FORMAT_TABLE} rows REGEX "^QATTN_KV_PAIR")
foreach(row IN LISTS rows)
  string(REGEX MATCH "\\(([A-Za-z0-9]+), *([A-Za-z0-9]+)" matched "${row}")
  list(APPEND QATTN_PAIRS ${CMAKE_MATCH_1}/${CMAKE_MATCH_2})
endforeach()
