#pragma once

// Symbols of a shared libquantattn are hidden unless marked; a static library and its users see no attribute that matters.
#if defined(__GNUC__) || defined(__clang__)
#define QATTN_API __attribute__((visibility("default")))
#else
#define QATTN_API
#endif

#define QATTN_VERSION_MAJOR 0
#define QATTN_VERSION_MINOR 1
#define QATTN_VERSION_PATCH 0
#define QATTN_VERSION "0.1.0"
