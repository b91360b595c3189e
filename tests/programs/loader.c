/* Loads the library whose path it is given, and asks it whether it is right. */
#include <dlfcn.h>
#include <stdio.h>

int main(int arguments, char **argument) {
    void *library = arguments == 2 ? dlopen(argument[1], RTLD_NOW | RTLD_LOCAL) : NULL;
    size_t (*check)(void) = library ? (size_t (*)(void))dlsym(library, "check") : NULL;
    if (!check) {
        fprintf(stderr, "loader: %s\n", arguments == 2 ? dlerror() : "usage: loader LIBRARY");
        return 2;
    }
    return check() ? 1 : 0;
}
