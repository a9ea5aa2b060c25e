// Definitions that the libraries would otherwise import from a newer libstdc++ or glibc than the
// oldest they support, GCC 8's and 2.28. tests/test_abi.py fails when another one is needed.

#include <sstream>

// GCC's headers expect these in libstdc++, which has some of their members only since GCC 9 or 11.
template class std::basic_stringbuf<char>;
template class std::basic_ostringstream<char>;
template class std::basic_stringstream<char>;

// From GCC 13 on, <iostream> asks the library to initialise its streams; none is used here.
void no_streams() asm("_ZSt21ios_base_library_initv");
void no_streams() {}

// shared_ptr reads this from glibc 2.32 on. 0: other threads may be running.
extern "C" {
char __libc_single_threaded = 0;
}
