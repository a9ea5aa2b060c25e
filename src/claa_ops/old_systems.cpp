// What the libraries would else take from a newer libstdc++ or glibc than they promise to run on:
// GCC 8's and 2.28. tests/test_abi.py fails when there is more.

#include <sstream>

// GCC's headers declare these as compiled in libstdc++, some members only since GCC 9 and 11.
template class std::basic_stringbuf<char>;
template class std::basic_ostringstream<char>;
template class std::basic_stringstream<char>;

// GCC 13's <iostream> has the library set its streams up; none is used here.
void no_streams() asm("_ZSt21ios_base_library_initv");
void no_streams() {}

// Since glibc 2.32 shared_ptr reads this there. 0: other threads may be running.
extern "C" {
char __libc_single_threaded = 0;
}
