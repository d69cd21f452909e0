// What this library was built for, readable without torch: fastkd compares it with what it finds.

#ifndef FASTKD_BUILD_INFO
#define FASTKD_BUILD_INFO "{}"
#endif

extern "C" __attribute__((visibility("default"))) const char* fastkd_build_info() {
  return FASTKD_BUILD_INFO;
}
