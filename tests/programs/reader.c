/* Reads files in every way that Linux has, and compares every byte.
 *
 * The content of a file is a function of its seed, that of src/content.rs. Each line of the standard input (check), or of
 * a list (crowd, hammer), is one file:
 *
 *     METHOD ORDER SEED SIZE PATH
 *
 *     reader check CHUNK DIRECTORY    one answer for each line: ok, or what is wrong. A line that comes twice is read
 *                                     through the same open file again. DIRECTORY takes copies.
 *     reader crowd THREADS LIST       every file by two threads at about the same time
 *     reader hammer THREADS SEED LIMIT LIST
 *                                     random ranges in random ways until the standard input ends
 *
 * Answers: "wrong OFFSET zeros|bytes|length N", "errno N at OFFSET", "bus at OFFSET". crowd and hammer answer for what is
 * not ok, with the method and the path before it, and end with "done READS"; hammer says "stuck" of a read that takes
 * longer than LIMIT seconds. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/io_uring.h>
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif

enum { PAGE = 4096, PIECE = 32768, ODD_PIECE = 70001, ANSWER = 160 };

typedef unsigned char byte;

struct file {
    uint64_t seed;
    size_t size;
    int fd;
    byte *map;      /* of the methods that map, with a page more than the file has */
    size_t mapped;
    int flags;      /* of open */
    int protection; /* of mmap; 0 for methods that do not map */
    int sharing;
};

struct item {
    const struct method *method;
    int scattered;
    uint64_t seed;
    size_t size;
    const char *path;
};

/* How many bytes were read, fewer than `length` only at the file's end, or a negative errno; BUS for a SIGBUS. */
typedef ssize_t get(struct file *file, off_t offset, size_t length, byte *into);

enum { BUS = -10000, NOT_PAST_END = -10001 };

struct method {
    const char *name;
    get *get;
    int flags;
    int protection;
    int sharing;
};

static const char *copies;

static void die(const char *what) {
    fprintf(stderr, "reader: %s: %s\n", what, strerror(errno));
    exit(2);
}

static void *allocate(size_t size) {
    void *memory = NULL;
    if (posix_memalign(&memory, PAGE, size ? size : 1)) die("no memory");
    return memory;
}

/* splitmix64, as in src/content.rs. */
static void noise(uint64_t seed, size_t offset, size_t length, byte *into) {
    while (length > 0) {
        uint64_t word = seed + (offset / 8 + 1) * UINT64_C(0x9e3779b97f4a7c15);
        word = (word ^ (word >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
        word = (word ^ (word >> 27)) * UINT64_C(0x94d049bb133111eb);
        word ^= word >> 31;
        size_t skip = offset % 8, take = 8 - skip < length ? 8 - skip : length;
        memcpy(into, (byte *)&word + skip, take);
        offset += take, into += take, length -= take;
    }
}

/* A fault of a mapped page ends the copy and not the program. */
static __thread sigjmp_buf fault;
static __thread volatile sig_atomic_t may_fault;

static void on_bus(int signal) {
    (void)signal;
    if (!may_fault) _exit(3);
    siglongjmp(fault, 1);
}

static ssize_t copy_mapped(byte *into, const byte *from, size_t length) {
    if (sigsetjmp(fault, 1)) {
        may_fault = 0;
        return BUS;
    }
    may_fault = 1;
    memcpy(into, from, length);
    may_fault = 0;
    return (ssize_t)length;
}

static size_t clamp(const struct file *file, off_t offset, size_t length) {
    if ((size_t)offset >= file->size) return 0;
    return length < file->size - (size_t)offset ? length : file->size - (size_t)offset;
}

/* ---- read and its kin ---- */

static ssize_t by_pread(struct file *file, off_t offset, size_t length, byte *into) {
    size_t done = 0;
    while (done < length) {
        ssize_t got = pread(file->fd, into + done, length - done, offset + (off_t)done);
        if (got < 0) return -errno;
        if (got == 0) break;
        done += (size_t)got;
    }
    return (ssize_t)done;
}

static ssize_t by_read(struct file *file, off_t offset, size_t length, byte *into) {
    if (lseek(file->fd, offset, SEEK_SET) < 0) return -errno;
    size_t done = 0;
    while (done < length) {
        ssize_t got = read(file->fd, into + done, length - done);
        if (got < 0) return -errno;
        if (got == 0) break;
        done += (size_t)got;
    }
    return (ssize_t)done;
}

static ssize_t vectored(struct file *file, off_t offset, size_t length, byte *into, int flags) {
    size_t first = length / 3, second = length / 5;
    struct iovec parts[3] = {
        {into, first}, {into + first, second}, {into + first + second, length - first - second}};
    ssize_t got = preadv2(file->fd, parts, 3, offset, flags);
    if (got < 0) return -errno;
    if (got == 0 || (size_t)got == length) return got;
    ssize_t rest = by_pread(file, offset + got, length - (size_t)got, into + got);
    return rest < 0 ? rest : got + rest;
}

static ssize_t by_readv(struct file *file, off_t offset, size_t length, byte *into) {
    return vectored(file, offset, length, into, 0);
}

/* What is not there yet must be told, and not be zeros. */
static ssize_t by_nowait(struct file *file, off_t offset, size_t length, byte *into) {
    ssize_t got = vectored(file, offset, length, into, RWF_NOWAIT);
    return got == -EAGAIN || got == -EOPNOTSUPP ? by_pread(file, offset, length, into) : got;
}

static ssize_t by_direct(struct file *file, off_t offset, size_t length, byte *into) {
    off_t begin = offset & ~(off_t)(PAGE - 1);
    size_t skip = (size_t)(offset - begin), whole = (skip + length + PAGE - 1) & ~(size_t)(PAGE - 1), done = 0;
    byte *aligned = allocate(whole);
    ssize_t result = 0;
    while (done < whole) {
        ssize_t got = pread(file->fd, aligned + done, whole - done, begin + (off_t)done);
        if (got < 0) result = -errno;
        if (got <= 0) break;
        done += (size_t)got;
        if (got % PAGE) break;
    }
    if (result == 0 && done > skip) {
        result = (ssize_t)(done - skip < length ? done - skip : length);
        memcpy(into, aligned + skip, (size_t)result);
    }
    free(aligned);
    return result;
}

static ssize_t by_readahead(struct file *file, off_t offset, size_t length, byte *into) {
    if (readahead(file->fd, offset, length) < 0) return -errno;
    return by_pread(file, offset, length, into);
}

static ssize_t by_fadvise(struct file *file, off_t offset, size_t length, byte *into) {
    int error = posix_fadvise(file->fd, offset, (off_t)length, POSIX_FADV_WILLNEED);
    if (error) return -error;
    return by_pread(file, offset, length, into);
}

/* ---- within the kernel ---- */

static ssize_t from_memory(int memory, size_t length, byte *into) {
    struct file file = {.fd = memory};
    ssize_t got = by_pread(&file, 0, length, into);
    close(memory);
    return got;
}

static ssize_t by_sendfile(struct file *file, off_t offset, size_t length, byte *into) {
    int memory = memfd_create("sendfile", MFD_CLOEXEC);
    if (memory < 0) return -errno;
    size_t done = 0;
    while (done < length) {
        ssize_t got = sendfile(memory, file->fd, &offset, length - done);
        if (got < 0) {
            int error = errno;
            close(memory);
            return -error;
        }
        if (got == 0) break;
        done += (size_t)got;
    }
    return from_memory(memory, done, into);
}

static ssize_t drain(int from, size_t length, byte *into) {
    for (size_t done = 0; done < length;) {
        ssize_t got = read(from, into + done, length - done);
        if (got <= 0) return got < 0 ? -errno : -EPIPE;
        done += (size_t)got;
    }
    return (ssize_t)length;
}

/* Through a socket or a pipe, in pieces that fit. */
static ssize_t through(struct file *file, off_t offset, size_t length, byte *into, int pair[2], int spliced) {
    size_t done = 0;
    ssize_t got = 0;
    while (done < length) {
        size_t piece = length - done < PIECE ? length - done : PIECE;
        got = spliced ? splice(file->fd, &offset, pair[1], NULL, piece, SPLICE_F_MOVE)
                      : sendfile(pair[1], file->fd, &offset, piece);
        if (got < 0) got = -errno;
        if (got <= 0) break;
        ssize_t drained = drain(pair[0], (size_t)got, into + done);
        if (drained < 0) got = drained;
        if (drained < 0) break;
        done += (size_t)got;
    }
    close(pair[0]), close(pair[1]);
    return got < 0 ? got : (ssize_t)done;
}

static ssize_t by_sendfile_socket(struct file *file, off_t offset, size_t length, byte *into) {
    int pair[2];
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair)) return -errno;
    return through(file, offset, length, into, pair, 0);
}

static ssize_t by_splice(struct file *file, off_t offset, size_t length, byte *into) {
    int pair[2];
    if (pipe2(pair, O_CLOEXEC)) return -errno;
    return through(file, offset, length, into, pair, 1);
}

/* Within one file system as programs see it: from a lower layer to the upper one. */
static ssize_t by_copy(struct file *file, off_t offset, size_t length, byte *into) {
    char path[4096];
    snprintf(path, sizeof path, "%s/copy-%d-%lx", copies, getpid(), (unsigned long)pthread_self());
    int copy = open(path, O_CREAT | O_TRUNC | O_RDWR | O_CLOEXEC, 0600);
    if (copy < 0) return -errno;
    unlink(path);
    size_t done = 0;
    while (done < length) {
        ssize_t got = copy_file_range(file->fd, &offset, copy, NULL, length - done, 0);
        if (got < 0) {
            int error = errno;
            close(copy);
            /* cp(1) reads then. */
            return error == EXDEV ? by_pread(file, offset, length, into) : -error;
        }
        if (got == 0) break;
        done += (size_t)got;
    }
    return from_memory(copy, done, into);
}

/* ---- mappings ---- */

static ssize_t mapped(struct file *file, off_t offset, size_t length, byte *into, int advice) {
    size_t inside = clamp(file, offset, length);
    if (inside == 0) {
        byte last;
        size_t end = file->size % PAGE;
        if (end) {
            /* The rest of the last page is zeros. */
            byte rest[PAGE];
            ssize_t got = copy_mapped(rest, file->map + file->size, PAGE - end);
            if (got < 0) return got;
            for (size_t at = 0; at < PAGE - end; at++)
                if (rest[at]) return NOT_PAST_END;
        }
        return copy_mapped(&last, file->map + file->mapped - 1, 1) == BUS ? 0 : NOT_PAST_END;
    }
    if (advice) {
        size_t begin = (size_t)offset & ~(size_t)(PAGE - 1);
        size_t end = ((size_t)offset + inside + PAGE - 1) & ~(size_t)(PAGE - 1);
        if (madvise(file->map + begin, end - begin, advice)) return -errno;
    }
    return copy_mapped(into, file->map + offset, inside);
}

static ssize_t by_mmap(struct file *file, off_t offset, size_t length, byte *into) {
    return mapped(file, offset, length, into, 0);
}

static ssize_t by_populate(struct file *file, off_t offset, size_t length, byte *into) {
    return mapped(file, offset, length, into, MADV_POPULATE_READ);
}

static ssize_t by_willneed(struct file *file, off_t offset, size_t length, byte *into) {
    return mapped(file, offset, length, into, MADV_WILLNEED);
}

/* A private mapping is written to, before it is read elsewhere and after; the file must not notice. */
static ssize_t by_private(struct file *file, off_t offset, size_t length, byte *into) {
    size_t inside = clamp(file, offset, length);
    ssize_t got = mapped(file, offset, length, into, 0);
    if (got <= 0 || inside == 0) return got;
    byte *own = file->map + offset;
    own[0] ^= 0xff;
    byte seen;
    ssize_t again = by_pread(file, offset, 1, &seen);
    own[0] ^= 0xff;
    if (again != 1) return again < 0 ? again : -EIO;
    return seen == into[0] ? got : NOT_PAST_END;
}

/* The kernel itself copies out of the mapping. */
static ssize_t by_mmap_write(struct file *file, off_t offset, size_t length, byte *into) {
    size_t inside = clamp(file, offset, length), done = 0;
    int memory = memfd_create("write", MFD_CLOEXEC);
    if (memory < 0) return -errno;
    while (done < inside) {
        ssize_t put = write(memory, file->map + offset + done, inside - done);
        if (put < 0) {
            int error = errno;
            close(memory);
            return error == EFAULT ? BUS : -error;
        }
        done += (size_t)put;
    }
    return from_memory(memory, done, into);
}

/* ---- io_uring ---- */

enum { URING_ENTRIES = 8, URING_PARTS = 4 };

struct uring {
    int fd;
    unsigned *tail, *mask, *array, *head, *completed_tail, *completed_mask;
    struct io_uring_sqe *entries;
    struct io_uring_cqe *completed;
};

static __thread struct uring uring = {.fd = -1};

static int open_uring(void) {
    struct io_uring_params parameters = {0};
    int fd = (int)syscall(SYS_io_uring_setup, URING_ENTRIES, &parameters);
    if (fd < 0) return -errno;
    size_t submission = parameters.sq_off.array + parameters.sq_entries * sizeof(unsigned);
    size_t completion = parameters.cq_off.cqes + parameters.cq_entries * sizeof(struct io_uring_cqe);
    int both = PROT_READ | PROT_WRITE;
    byte *sq = mmap(NULL, submission, both, MAP_SHARED | MAP_POPULATE, fd, IORING_OFF_SQ_RING);
    byte *cq = mmap(NULL, completion, both, MAP_SHARED | MAP_POPULATE, fd, IORING_OFF_CQ_RING);
    void *sqes = mmap(NULL, parameters.sq_entries * sizeof(struct io_uring_sqe), both, MAP_SHARED | MAP_POPULATE, fd,
                      IORING_OFF_SQES);
    if (sq == MAP_FAILED || cq == MAP_FAILED || sqes == MAP_FAILED) return -errno;
    uring = (struct uring){
        .fd = fd,
        .tail = (unsigned *)(sq + parameters.sq_off.tail),
        .mask = (unsigned *)(sq + parameters.sq_off.ring_mask),
        .array = (unsigned *)(sq + parameters.sq_off.array),
        .head = (unsigned *)(cq + parameters.cq_off.head),
        .completed_tail = (unsigned *)(cq + parameters.cq_off.tail),
        .completed_mask = (unsigned *)(cq + parameters.cq_off.ring_mask),
        .entries = sqes,
        .completed = (struct io_uring_cqe *)(cq + parameters.cq_off.cqes),
    };
    return 0;
}

/* Four parts at once, every other one from a worker of the kernel's. */
static ssize_t by_uring(struct file *file, off_t offset, size_t length, byte *into) {
    int opened = uring.fd < 0 ? open_uring() : 0;
    if (opened < 0) return opened;
    size_t begin[URING_PARTS + 1];
    ssize_t got[URING_PARTS];
    unsigned tail = *uring.tail;
    for (unsigned part = 0; part <= URING_PARTS; part++) begin[part] = length * part / URING_PARTS;
    for (unsigned part = 0; part < URING_PARTS; part++) {
        unsigned at = (tail + part) & *uring.mask;
        uring.entries[at] = (struct io_uring_sqe){
            .opcode = IORING_OP_READ,
            .flags = part % 2 ? IOSQE_ASYNC : 0,
            .fd = file->fd,
            .off = (uint64_t)offset + begin[part],
            .addr = (uint64_t)(uintptr_t)(into + begin[part]),
            .len = (unsigned)(begin[part + 1] - begin[part]),
            .user_data = part,
        };
        uring.array[at] = at;
    }
    atomic_store_explicit((_Atomic unsigned *)uring.tail, tail + URING_PARTS, memory_order_release);
    for (unsigned submit = URING_PARTS, left = URING_PARTS; left > 0;) {
        long entered = syscall(SYS_io_uring_enter, uring.fd, submit, 1, IORING_ENTER_GETEVENTS, NULL, 0);
        if (entered < 0 && errno != EINTR) die("io_uring_enter");
        if (entered > 0) submit -= (unsigned)entered;
        unsigned head = *uring.head;
        while (head != atomic_load_explicit((_Atomic unsigned *)uring.completed_tail, memory_order_acquire)) {
            struct io_uring_cqe *completed = &uring.completed[head++ & *uring.completed_mask];
            got[completed->user_data] = completed->res;
            left--;
        }
        atomic_store_explicit((_Atomic unsigned *)uring.head, head, memory_order_release);
    }
    size_t done = 0;
    for (unsigned part = 0; part < URING_PARTS; part++) {
        size_t wanted = begin[part + 1] - begin[part];
        if (got[part] < 0) return got[part];
        if ((size_t)got[part] < wanted) {
            /* Short reads are allowed; what is missing is asked for again. */
            ssize_t rest = by_pread(file, offset + (off_t)begin[part] + got[part], wanted - (size_t)got[part],
                                    into + begin[part] + got[part]);
            if (rest < 0) return rest;
            got[part] += rest;
        }
        done += (size_t)got[part];
        if ((size_t)got[part] < wanted) break;
    }
    return (ssize_t)done;
}

static const struct method methods[] = {
    {"read", by_read, O_RDONLY, 0, 0},
    {"pread", by_pread, O_RDONLY, 0, 0},
    {"readv", by_readv, O_RDONLY, 0, 0},
    {"nowait", by_nowait, O_RDONLY, 0, 0},
    {"direct", by_direct, O_RDONLY | O_DIRECT, 0, 0},
    {"readahead", by_readahead, O_RDONLY, 0, 0},
    {"fadvise", by_fadvise, O_RDONLY, 0, 0},
    {"sendfile", by_sendfile, O_RDONLY, 0, 0},
    {"sendfile_socket", by_sendfile_socket, O_RDONLY, 0, 0},
    {"splice", by_splice, O_RDONLY, 0, 0},
    {"copy_file_range", by_copy, O_RDONLY, 0, 0},
    {"mmap_shared", by_mmap, O_RDONLY, PROT_READ, MAP_SHARED},
    {"mmap_private", by_private, O_RDONLY, PROT_READ | PROT_WRITE, MAP_PRIVATE},
    {"mmap_exec", by_mmap, O_RDONLY, PROT_READ | PROT_EXEC, MAP_PRIVATE},
    {"mmap_write", by_mmap_write, O_RDONLY, PROT_READ, MAP_SHARED},
    {"populate", by_populate, O_RDONLY, PROT_READ, MAP_SHARED},
    {"willneed", by_willneed, O_RDONLY, PROT_READ, MAP_PRIVATE},
    {"io_uring", by_uring, O_RDONLY, 0, 0},
};

enum { METHODS = sizeof methods / sizeof *methods };

/* ---- files ---- */

static int open_file(struct file *file, const struct item *item) {
    *file = (struct file){.seed = item->seed, .size = item->size, .fd = open(item->path, item->method->flags | O_CLOEXEC)};
    if (file->fd < 0) return -errno;
    if (!item->method->protection) return 0;
    file->mapped = ((item->size + PAGE - 1) & ~(size_t)(PAGE - 1)) + PAGE;
    file->map = mmap(NULL, file->mapped, item->method->protection, item->method->sharing, file->fd, 0);
    if (file->map == MAP_FAILED) {
        file->map = NULL;
        int error = errno;
        close(file->fd);
        return -error;
    }
    return 0;
}

static void close_file(struct file *file) {
    if (file->map) munmap(file->map, file->mapped);
    close(file->fd);
}

/* Reads one range and says what is wrong with it; whether all is well. */
static int check_range(const struct method *method, struct file *file, size_t offset, size_t length, char *answer) {
    size_t expected = clamp(file, (off_t)offset, length);
    byte *got = allocate(length), *right = allocate(expected);
    memset(got, 0xa5, length);
    ssize_t read = method->get(file, (off_t)offset, length, got);
    int good = 0;
    if (read == BUS) {
        snprintf(answer, ANSWER, "bus at %zu", offset);
    } else if (read == NOT_PAST_END) {
        snprintf(answer, ANSWER, "wrong %zu beyond the end, or written through", offset);
    } else if (read < 0) {
        snprintf(answer, ANSWER, "errno %zd at %zu", -read, offset);
    } else if ((size_t)read != expected) {
        snprintf(answer, ANSWER, "wrong %zu length %zd", offset, read);
    } else {
        noise(file->seed, offset, expected, right);
        size_t at = 0;
        while (at < expected && got[at] == right[at]) at++;
        good = at == expected;
        if (!good) snprintf(answer, ANSWER, "wrong %zu %s", offset + at, got[at] ? "bytes" : "zeros");
    }
    free(got), free(right);
    return good;
}

static int check_scattered(const struct item *item, struct file *file, size_t chunk, char *answer) {
    size_t size = item->size;
    size_t ranges[][2] = {
        {chunk - 1, 3},  {4095, 2},           {size ? size - 1 : 0, 10}, {size, 10},       {size + PAGE, 100},
        {1, PAGE + 1},   {chunk - 5000, 10000}, {2 * chunk - 1, chunk + 2}, {size / 2, ODD_PIECE}, {0, size + 1},
    };
    for (size_t at = 0; at < sizeof ranges / sizeof *ranges; at++)
        if (!check_range(item->method, file, ranges[at][0], ranges[at][1], answer)) return 0;
    return 1;
}

static int check_whole(const struct item *item, struct file *file, char *answer) {
    for (size_t offset = 0; offset <= item->size; offset += ODD_PIECE)
        if (!check_range(item->method, file, offset, ODD_PIECE, answer)) return 0;
    return check_range(item->method, file, item->size, 1, answer);
}

/* ---- what is asked for ---- */

static int parse(char *line, struct item *item) {
    char *save = NULL, *words[5];
    for (int word = 0; word < 4; word++)
        if (!(words[word] = strtok_r(word ? NULL : line, " ", &save))) return 0;
    if (!(words[4] = strtok_r(NULL, "\n", &save))) return 0;
    *item = (struct item){
        .scattered = !strcmp(words[1], "scattered"),
        .seed = strtoull(words[2], NULL, 10),
        .size = strtoull(words[3], NULL, 10),
        .path = words[4],
    };
    for (int method = 0; method < METHODS; method++)
        if (!strcmp(methods[method].name, words[0])) item->method = &methods[method];
    return item->method != NULL;
}

static int check(size_t chunk) {
    static char line[8192], last[8192], kept[8192];
    struct file file;
    int held = 0;
    while (fgets(line, sizeof line, stdin)) {
        struct item item;
        char answer[ANSWER] = "ok";
        int again = held && !strcmp(line, last);
        if (!again) {
            if (held) close_file(&file);
            strcpy(last, line);
        }
        strcpy(kept, line);
        if (!parse(kept, &item)) {
            fprintf(stderr, "reader: cannot make sense of %s", line);
            return 2;
        }
        int opened = again ? 0 : open_file(&file, &item);
        held = opened == 0;
        if (opened < 0)
            snprintf(answer, sizeof answer, "errno %d at open", -opened);
        else if (item.scattered)
            check_scattered(&item, &file, chunk, answer);
        else
            check_whole(&item, &file, answer);
        puts(answer);
        fflush(stdout);
    }
    return 0;
}

static struct item *items;
static size_t count;

static void load(const char *path) {
    FILE *list = fopen(path, "re");
    char *line = NULL;
    size_t room = 0, capacity = 0;
    if (!list) die(path);
    while (getline(&line, &room, list) > 0) {
        if (count == capacity) {
            capacity = capacity ? capacity * 2 : 1024;
            items = realloc(items, capacity * sizeof *items);
            if (!items) die("no memory");
        }
        if (!parse(strdup(line), &items[count++])) die("cannot make sense of a line");
    }
    free(line);
    fclose(list);
    if (!count) die("an empty list");
}

static pthread_mutex_t said = PTHREAD_MUTEX_INITIALIZER;

static void say(const struct item *item, const struct method *method, const char *answer) {
    pthread_mutex_lock(&said);
    printf("%s %s: %s\n", method->name, item->path, answer);
    fflush(stdout);
    pthread_mutex_unlock(&said);
}

static atomic_size_t next, reads;

static void *in_crowd(void *unused) {
    (void)unused;
    for (;;) {
        size_t turn = atomic_fetch_add(&next, 1) / 2;
        if (turn >= count) return NULL;
        /* A step that has no divisor in common with the count visits all. */
        const struct item *item = &items[(turn * 7919) % count];
        struct file file;
        char answer[ANSWER];
        int opened = open_file(&file, item);
        if (opened < 0) {
            snprintf(answer, sizeof answer, "errno %d at open", -opened);
            say(item, item->method, answer);
            continue;
        }
        if (!check_whole(item, &file, answer)) say(item, item->method, answer);
        close_file(&file);
        atomic_fetch_add(&reads, 1);
    }
}

struct hammer {
    pthread_t thread;
    uint64_t state;
    _Atomic(const struct item *) at;
    _Atomic(const struct method *) how;
    atomic_long since;
};

static atomic_int ending;

static uint64_t draw(uint64_t *state, uint64_t below) {
    byte word[8];
    uint64_t drawn;
    noise((*state)++, 0, sizeof word, word);
    memcpy(&drawn, word, sizeof drawn);
    return drawn % below;
}

static long seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec;
}

static void *at_work(void *argument) {
    struct hammer *hammer = argument;
    while (!ending) {
        const struct item *chosen = &items[draw(&hammer->state, count)];
        struct item item = *chosen;
        size_t offset = draw(&hammer->state, item.size + PAGE), length = 1 + draw(&hammer->state, 3 * PIECE);
        item.method = &methods[draw(&hammer->state, METHODS)];
        /* It would have to write, and has nowhere to. */
        if (item.method->get == by_copy) continue;
        char answer[ANSWER];
        struct file file;
        hammer->at = chosen;
        hammer->how = item.method;
        hammer->since = seconds();
        int opened = open_file(&file, &item);
        if (opened < 0) {
            snprintf(answer, sizeof answer, "errno %d at open", -opened);
            say(&item, item.method, answer);
        } else {
            /* What the kernel has cached would never be asked for again. */
            if (draw(&hammer->state, 2)) posix_fadvise(file.fd, 0, 0, POSIX_FADV_DONTNEED);
            if (!check_range(item.method, &file, offset, length, answer)) say(&item, item.method, answer);
            close_file(&file);
        }
        hammer->since = 0;
        atomic_fetch_add(&reads, 1);
    }
    return NULL;
}

static int crowd(int threads) {
    pthread_t crowd[256];
    if (threads < 1 || threads > 256) return 2;
    for (int thread = 0; thread < threads; thread++)
        if (pthread_create(&crowd[thread], NULL, in_crowd, NULL)) die("a thread");
    for (int thread = 0; thread < threads; thread++) pthread_join(crowd[thread], NULL);
    printf("done %zu\n", reads);
    return 0;
}

static int stuck(struct hammer *hammer, long limit) {
    long since = hammer->since;
    if (!since || seconds() - since <= limit) return 0;
    say(hammer->at, hammer->how, "stuck");
    return 1;
}

static int hammer(int threads, uint64_t seed, long limit) {
    static struct hammer hammers[64];
    if (threads < 1 || threads > 64) return 2;
    for (int thread = 0; thread < threads; thread++) {
        hammers[thread].state = seed + (uint64_t)thread * 1000003;
        if (pthread_create(&hammers[thread].thread, NULL, at_work, &hammers[thread])) die("a thread");
    }
    struct pollfd input = {.fd = 0, .events = POLLIN};
    long end = 0;
    for (;;) {
        if (!ending && poll(&input, 1, 200) > 0) {
            ending = 1;
            end = seconds();
        }
        int busy = 0;
        for (int thread = 0; thread < threads; thread++) {
            if (stuck(&hammers[thread], limit)) _exit(4);
            busy += hammers[thread].since != 0;
        }
        /* A thread between two reads sees the end soon. */
        if (ending && !busy && seconds() - end >= 1) break;
        if (ending) usleep(20000);
    }
    for (int thread = 0; thread < threads; thread++) pthread_join(hammers[thread].thread, NULL);
    printf("done %zu\n", reads);
    return 0;
}

int main(int arguments, char **argument) {
    struct sigaction action = {.sa_handler = on_bus, .sa_flags = SA_NODEFER};
    sigaction(SIGBUS, &action, NULL);
    signal(SIGPIPE, SIG_IGN);
    if (arguments == 4 && !strcmp(argument[1], "check")) {
        copies = argument[3];
        return check(strtoull(argument[2], NULL, 10));
    }
    if (arguments == 4 && !strcmp(argument[1], "crowd")) {
        load(argument[3]);
        return crowd(atoi(argument[2]));
    }
    if (arguments == 6 && !strcmp(argument[1], "hammer")) {
        load(argument[5]);
        return hammer(atoi(argument[2]), strtoull(argument[3], NULL, 10), atol(argument[4]));
    }
    fprintf(stderr, "usage: reader check CHUNK DIRECTORY | crowd THREADS LIST | hammer THREADS SEED LIMIT LIST\n");
    return 2;
}
