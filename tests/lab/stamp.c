/* A program for Linux guests that tells whether a fork kept its promises: that memory is what this guest, and nobody
 * else, wrote; that counters and clocks go on; that random numbers differ.
 *
 * It reads lines, and answers each with one line, `ok …` or `err …`. With arguments it does that one line and ends. No
 * answer has the asking line in it, so that whoever skips the echo of that does not skip the answer.
 *
 *   fill MIB SEED      writes every word of so much memory with a value derived from (SEED, page, word)
 *   touch MIB SEED     the same, the first word of each page only
 *   verify SEED        checks what fill wrote; verify-touch SEED, what touch wrote
 *   dirty FIRST COUNT SEED  fills single pages of what is there
 *   verify-page FIRST COUNT SEED  checks those
 *   next               a counter: how often this was asked
 *   ticks              another, which counts milliseconds on its own
 *   random             16 bytes from the kernel
 *   gap MS             watches CLOCK_MONOTONIC: the longest time it stood still, and whether it went back
 *   clock              CLOCK_MONOTONIC and CLOCK_REALTIME in µs
 *   spin MS            keeps the processor busy in user space
 *   quit
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <time.h>

enum { PAGE = 4096, WORDS = PAGE / 8 };

static volatile uint64_t *memory;
static uint64_t pages;
static uint64_t asked;
static volatile uint64_t milliseconds;

static int64_t now_ns(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

/* Never 0, so that a page that was lost is told from one that was written. */
static uint64_t value(uint64_t seed, uint64_t page, uint64_t word) {
    uint64_t x = (seed << 40) ^ (page << 10) ^ word;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
    return (x ^ (x >> 31)) | 1;
}

static int reserve(uint64_t mib) {
    uint64_t want = mib * 1024 * 1024 / PAGE;
    if (memory && want == pages) return 1;
    if (memory) munmap((void *)memory, pages * PAGE);
    memory = NULL, pages = 0;
    void *got = mmap(NULL, want * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (got == MAP_FAILED) return 0;
    memory = got, pages = want;
    return 1;
}

static void write_pages(uint64_t first, uint64_t count, uint64_t words, uint64_t seed) {
    for (uint64_t page = first; page < first + count; page++)
        for (uint64_t word = 0; word < words; word++) memory[page * WORDS + word] = value(seed, page, word);
}

/* Answers. */
static void check_pages(uint64_t first, uint64_t count, uint64_t words, uint64_t seed) {
    for (uint64_t page = first; page < first + count; page++)
        for (uint64_t word = 0; word < words; word++) {
            uint64_t got = memory[page * WORDS + word], want = value(seed, page, word);
            if (got != want) {
                printf("err mismatch page=%lu word=%lu want=%016lx got=%016lx\n", page, word, want, got);
                return;
            }
        }
    printf("ok verified pages=%lu seed=%lu\n", count, seed);
}

static void watch_clock(int64_t ms) {
    int64_t start = now_ns(CLOCK_MONOTONIC), last = start, longest = 0, back = 0;
    while (last - start < ms * 1000000) {
        int64_t t = now_ns(CLOCK_MONOTONIC);
        if (t - last > longest) longest = t - last;
        if (last - t > back) back = last - t;
        last = t;
    }
    printf("ok max_gap_us=%ld back_us=%ld\n", longest / 1000, back / 1000);
}

static void *tick(void *unused) {
    const struct timespec ms = {0, 1000000};
    for (;; milliseconds++) nanosleep(&ms, NULL);
    return unused;
}

static void obey(const char *line) {
    char verb[32] = "";
    uint64_t a = 0, b = 0, c = 0;
    int count = sscanf(line, "%31s %lu %lu %lu", verb, &a, &b, &c) - 1;
    int inside = count == 3 && memory && b <= pages && a <= pages - b;
    if (count < 0) {
        return;
    } else if ((!strcmp(verb, "fill") || !strcmp(verb, "touch")) && count == 2) {
        if (!reserve(a)) { printf("err no memory\n"); return; }
        write_pages(0, pages, *verb == 'f' ? WORDS : 1, b);
        printf("ok pages=%lu seed=%lu\n", pages, b);
    } else if (!strcmp(verb, "verify") && count == 1 && memory) {
        check_pages(0, pages, WORDS, a);
    } else if (!strcmp(verb, "verify-touch") && count == 1 && memory) {
        check_pages(0, pages, 1, a);
    } else if (!strcmp(verb, "dirty") && inside) {
        write_pages(a, b, WORDS, c);
        printf("ok pages=%lu seed=%lu\n", b, c);
    } else if (!strcmp(verb, "verify-page") && inside) {
        check_pages(a, b, WORDS, c);
    } else if (!strcmp(verb, "next")) {
        printf("ok asked=%lu\n", ++asked);
    } else if (!strcmp(verb, "ticks")) {
        printf("ok ms=%lu\n", milliseconds);
    } else if (!strcmp(verb, "random")) {
        unsigned char bytes[16];
        if (getrandom(bytes, sizeof bytes, 0) != sizeof bytes) { printf("err getrandom\n"); return; }
        printf("ok bytes=");
        for (size_t i = 0; i < sizeof bytes; i++) printf("%02x", bytes[i]);
        printf("\n");
    } else if (!strcmp(verb, "gap") && count == 1) {
        watch_clock(a);
    } else if (!strcmp(verb, "clock")) {
        printf("ok monotonic_us=%ld realtime_us=%ld\n", now_ns(CLOCK_MONOTONIC) / 1000, now_ns(CLOCK_REALTIME) / 1000);
    } else if (!strcmp(verb, "spin") && count == 1) {
        for (int64_t end = now_ns(CLOCK_MONOTONIC) + (int64_t)a * 1000000; now_ns(CLOCK_MONOTONIC) < end;) continue;
        printf("ok spun\n");
    } else if (!strcmp(verb, "quit")) {
        printf("ok bye\n");
        exit(0);
    } else {
        printf("err what? %s\n", verb);
    }
}

int main(int argc, char **argv) {
    char line[256] = "";
    pthread_t ticker;
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (argc > 1) {
        for (int i = 1; i < argc; i++) {
            strncat(line, argv[i], sizeof line - strlen(line) - 1);
            strncat(line, " ", sizeof line - strlen(line) - 1);
        }
        obey(line);
        return 0;
    }
    if (pthread_create(&ticker, NULL, tick, NULL)) return 1;
    printf("ok ready\n");
    while (fgets(line, sizeof line, stdin)) obey(line);
    return 0;
}
