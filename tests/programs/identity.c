/* Who a program is, and what it may do.
 *
 *     identity as ROOT UID GID,GID… PROGRAM ARGUMENT…   becomes a user below a root, and runs a program there
 *     identity who                                      ids and capabilities of this process
 *     identity open PATH…                               whether a path may be read, and written to
 *     identity xattrs PATH…                             the extended attributes of a path, names and values
 *     identity make DIRECTORY                           the mode and the attributes of a file and a directory made there */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/capability.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/xattr.h>
#include <unistd.h>

enum { LONGEST = 65536, GROUPS = 16 };

static int fail(const char *what) {
    fprintf(stderr, "identity: %s: %s\n", what, strerror(errno));
    return 2;
}

static int as(char **argument) {
    gid_t groups[GROUPS];
    size_t count = 0;
    for (char *group = strtok(argument[2], ","); group && count < GROUPS; group = strtok(NULL, ","))
        groups[count++] = (gid_t)strtoul(group, NULL, 10);
    uid_t user = (uid_t)strtoul(argument[1], NULL, 10);
    if (chroot(argument[0]) || chdir("/")) return fail(argument[0]);
    if (setgroups(count - 1, groups + 1) || setresgid(groups[0], groups[0], groups[0])) return fail("groups");
    if (setresuid(user, user, user)) return fail("user");
    execv(argument[3], argument + 3);
    printf("%s: not executed: %s\n", argument[3], strerror(errno));
    return 1;
}

static int who(void) {
    uid_t users[3];
    gid_t groups[3];
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct sets[2] = {{0}};
    if (getresuid(&users[0], &users[1], &users[2]) || getresgid(&groups[0], &groups[1], &groups[2])) return fail("ids");
    if (syscall(SYS_capget, &header, sets)) return fail("capabilities");
    printf("users %u %u %u groups %u %u %u effective %08x%08x permitted %08x%08x\n", users[0], users[1], users[2],
           groups[0], groups[1], groups[2], sets[1].effective, sets[0].effective, sets[1].permitted,
           sets[0].permitted);
    return 0;
}

static const char *opened(const char *path, int flags) {
    int file = open(path, flags | O_CLOEXEC);
    if (file < 0) return strerror(errno);
    close(file);
    return "yes";
}

static int by_name(const void *left, const void *right) {
    return strcmp(*(char *const *)left, *(char *const *)right);
}

static void xattrs(const char *path) {
    static char names[LONGEST], value[LONGEST];
    char *sorted[256];
    size_t count = 0;
    ssize_t length = llistxattr(path, names, sizeof names);
    if (length < 0) printf("%s: no list: %s\n", path, strerror(errno));
    for (char *name = names; length > 0 && name < names + length && count < 256; name += strlen(name) + 1)
        sorted[count++] = name;
    qsort(sorted, count, sizeof *sorted, by_name);
    for (size_t at = 0; at < count; at++) {
        ssize_t size = lgetxattr(path, sorted[at], value, sizeof value);
        printf("%s: %s", path, sorted[at]);
        if (size < 0) printf(" not read: %s", strerror(errno));
        for (ssize_t byte = 0; byte < size; byte++) printf("%s%02x", byte ? "" : " ", (unsigned char)value[byte]);
        puts("");
    }
    if (getxattr(path, "user.there-is-no-such-name", value, sizeof value) >= 0 || errno != ENODATA)
        printf("%s: an attribute that is not there: %s\n", path, strerror(errno));
}

static int make(const char *directory) {
    char path[4096];
    for (int kind = 0; kind < 2; kind++) {
        struct stat status;
        snprintf(path, sizeof path, "%s/made-%d", directory, kind);
        int made = kind ? mkdir(path, 0777) : open(path, O_CREAT | O_EXCL | O_WRONLY, 0666);
        if (made < 0 || lstat(path, &status)) {
            printf("%s: not made: %s\n", path, strerror(errno));
            continue;
        }
        printf("%s: %o %u %u\n", path, status.st_mode, status.st_uid, status.st_gid);
        xattrs(path);
    }
    return 0;
}

int main(int arguments, char **argument) {
    umask(022);
    const char *what = arguments > 1 ? argument[1] : "who";
    if (!strcmp(what, "who")) return who();
    if (!strcmp(what, "as") && arguments >= 6) return as(argument + 2);
    if (!strcmp(what, "make") && arguments == 3) return make(argument[2]);
    for (int at = 2; at < arguments; at++) {
        if (!strcmp(what, "open"))
            printf("%s: read %s, write %s\n", argument[at], opened(argument[at], O_RDONLY), opened(argument[at], O_WRONLY));
        else
            xattrs(argument[at]);
    }
    return 0;
}
