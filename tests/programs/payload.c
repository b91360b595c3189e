/* A program, or with LIBRARY a library, that is full of bytes which it knows: those of the file payload.bin, made from SEED
 * (src/content.rs). They are there twice, to be read and to be written to. */
#include <stddef.h>
#include <stdint.h>

__asm__(".pushsection .rodata\n.balign 16\n.globl fixed\nfixed:\n.incbin \"payload.bin\"\n.globl fixed_end\nfixed_end:\n"
        ".section .data\n.balign 16\n.globl own\nown:\n.incbin \"payload.bin\"\n.popsection\n");

extern const unsigned char fixed[], fixed_end[] __attribute__((visibility("hidden")));
extern unsigned char own[] __attribute__((visibility("hidden")));

/* 0 if every byte is right; the place of the first one that is not, from 1, otherwise. */
size_t check(void) {
    size_t size = (size_t)(fixed_end - fixed);
    for (size_t at = 0; at < size; at++) {
        uint64_t word = (uint64_t)(SEED) + (at / 8 + 1) * UINT64_C(0x9e3779b97f4a7c15);
        word = (word ^ (word >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
        word = (word ^ (word >> 27)) * UINT64_C(0x94d049bb133111eb);
        word ^= word >> 31;
        unsigned char right = (unsigned char)(word >> (at % 8 * 8));
        own[at] ^= right;
        if (fixed[at] != right || own[at] != 0) return at + 1;
    }
    return 0;
}

#ifndef LIBRARY
int main(void) { return check() ? 1 : 0; }
#endif
