/* A kernel for tests: it drives the virtio socket device, and nothing else. It polls, since it has no interrupts, and runs on
 * every host, also where a stock kernel does not.
 *
 * | port | what it does with a connection |
 * | ---: | --- |
 * | 1 | passes it on to port 1 of the host, where a test has an agent listen: so whoever asks for the guest's agent gets that |
 * | 7 | sends back what comes |
 * | 8 | says how many other connections it has, how many were reset while they were open, and how many of its own were refused |
 * | 9 | takes a number of four bytes: connects to that port of the host, and sends back what comes there |
 * | 10 | never answers |
 * | 11 | lies, once for every byte that comes: see `lie` |
 *
 * The test that compiles it says where the device is: BASE.
 */

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;

#define RING 16
#define BUFFER 4096
#define HEADER 44
#define CONNECTIONS 256
#define ROOM 4096

enum { REQUEST = 1, RESPONSE, RST, SHUTDOWN, DATA, CREDIT_UPDATE, CREDIT_REQUEST };
enum { RELAY = 1, ECHO = 7, COUNT, CALL, SILENT, LIAR };

struct descriptor { u64 address; u32 len; u16 flags, next; };
struct available { u16 flags, index, ring[RING]; };
struct used { u16 flags, index; struct { u32 id, len; } ring[RING]; };
struct header {
    u64 from_cid, to_cid;
    u32 from_port, to_port, len;
    u16 type, op;
    u32 flags, room, taken;
} __attribute__((packed));

static struct queue {
    struct descriptor descriptors[RING] __attribute__((aligned(4096)));
    struct available available __attribute__((aligned(4096)));
    volatile struct used used __attribute__((aligned(4096)));
    u8 buffers[RING][HEADER + BUFFER] __attribute__((aligned(16)));
    u16 seen, given;
} queues[2];

static struct connection {
    u32 host, guest;
    u8 there, open, ends, answers, calls;
    /* What has come waits to be sent on this one: it is the same, or the one to which it is passed on. */
    struct connection *to;
    u8 passed_end;
    u32 waiting;
    u8 bytes[ROOM];
    u32 sent, taken, told, room, peer_taken;
} connections[CONNECTIONS];

static u32 resets, refusals, next_port = 50000, lies;

static volatile u32 *reg(u32 offset) { return (volatile u32 *)(u64)(BASE + offset); }

static void copy(u8 *to, const u8 *from, u64 len) {
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(len) : : "memory");
}

static void print(const char *text) {
    for (; *text; text++)
        __asm__ volatile("outb %0, %1" : : "a"(*text), "d"((u16)0x3f8));
}

static void give(u32 index, u16 descriptor, u32 len) {
    struct queue *queue = &queues[index];
    queue->descriptors[descriptor].len = len;
    queue->available.ring[queue->available.index % RING] = descriptor;
    __asm__ volatile("" : : : "memory");
    queue->available.index++;
    *reg(0x50) = index;
}

static int may_send(void) { return (u16)(queues[1].given - queues[1].used.index) < RING; }

/* `len` bytes lie behind the header; it tells of so many, and `more`. */
static void send(struct connection *connection, u16 op, u32 flags, u32 len, u32 more) {
    struct queue *queue = &queues[1];
    u16 descriptor = queue->given++ % RING;
    struct header *header = (struct header *)queue->buffers[descriptor];
    *header = (struct header){
        .from_cid = 3, .to_cid = 2, .from_port = connection->guest, .to_port = connection->host, .len = len + more,
        .type = 1, .op = op, .flags = flags, .room = ROOM, .taken = connection->taken,
    };
    connection->told = connection->taken;
    give(1, descriptor, HEADER + len);
}

static struct connection *find(u32 host, u32 guest) {
    for (u32 i = 0; i < CONNECTIONS; i++)
        if (connections[i].there && connections[i].host == host && connections[i].guest == guest)
            return &connections[i];
    return 0;
}

static struct connection *begin(u32 host, u32 guest) {
    for (u32 i = 0; i < CONNECTIONS; i++) {
        struct connection *it = &connections[i];
        if (it->there)
            continue;
        it->host = host, it->guest = guest, it->there = 1, it->open = it->ends = it->answers = it->calls = it->passed_end = 0, it->to = it;
        it->waiting = it->sent = it->taken = it->told = it->room = it->peer_taken = 0;
        return it;
    }
    return 0;
}

static void say_number(struct connection *it, u32 number) {
    u8 digits[10];
    u32 count = 0;
    do
        digits[count++] = '0' + number % 10;
    while (number /= 10);
    while (count)
        it->bytes[it->waiting++] = digits[--count];
    it->bytes[it->waiting++] = ' ';
}

static struct connection *call(u32 port) {
    struct connection *it = may_send() ? begin(port, next_port++) : 0;
    if (!it)
        return 0;
    it->calls = 1;
    send(it, REQUEST, 0, 0, 0);
    return it;
}

static void requested(struct header *header) {
    u32 port = header->to_port;
    if (port == SILENT)
        return;
    struct connection none = {.host = header->from_port, .guest = port};
    struct connection *it = port == RELAY || (port >= ECHO && port <= LIAR) ? begin(header->from_port, port) : 0;
    if (!it) {
        if (may_send())
            send(&none, RST, 0, 0, 0);
        return;
    }
    it->open = it->answers = 1;
    it->room = header->room;
    if (port == RELAY) {
        struct connection *agent = call(RELAY);
        if (agent)
            it->to = agent, agent->to = it;
        else
            it->ends = 3;
    }
    if (port == COUNT) {
        u32 there = 0;
        for (u32 i = 0; i < CONNECTIONS; i++)
            there += connections[i].there;
        say_number(it, there - 1);
        say_number(it, resets);
        say_number(it, refusals);
        it->ends = 3;
    }
}

static void took(struct connection *it, u8 *bytes, u32 len) {
    if (it->waiting + len > ROOM) {
        print("too much\n");
        return;
    }
    copy(it->bytes + it->waiting, bytes, len);
    it->waiting += len;
    if (it->guest == CALL && it->waiting >= 4) {
        call(*(u32 *)it->bytes);
        it->taken += it->waiting;
        it->waiting = 0;
        it->ends = 3;
    }
}

static void heard(struct header *header) {
    struct connection *it = find(header->from_port, header->to_port);
    if (!it) {
        if (header->op == REQUEST)
            requested(header);
        return;
    }
    it->room = header->room, it->peer_taken = header->taken;
    switch (header->op) {
    case RESPONSE: it->open = 1, it->calls = 0; break;
    case RST:
        it->there = 0, resets += it->open, refusals += it->calls;
        if (it->to != it && it->to->there) {
            it->to->there = 0;
            if (may_send())
                send(it->to, RST, 0, 0, 0);
        }
        break;
    case SHUTDOWN: it->ends |= header->flags; break;
    case DATA: took(it, (u8 *)(header + 1), header->len); break;
    }
}

/* A header that cannot be, each time another. */
static void lie(struct connection *it) {
    struct connection liar = *it;
    u32 kind = lies++ % 6, noise = lies * 2654435761u;
    if (kind == 0) liar.host ^= noise;
    if (kind == 1) liar.guest ^= noise;
    u16 op = kind == 2 ? noise : kind == 3 ? RESPONSE : kind == 4 ? REQUEST : DATA;
    send(&liar, op, noise, 0, kind == 5 ? noise | 1u << 20 : 0);
}

static void work(struct connection *it) {
    if (!may_send() || !it->there || (!it->open && !it->answers))
        return;
    if (it->answers) {
        it->answers = 0;
        send(it, RESPONSE, 0, 0, 0);
        return;
    }
    struct connection *to = it->to;
    u32 room = to->room - (to->sent - to->peer_taken);
    if (it->waiting && to->open && room && room <= to->room && it->guest != CALL) {
        u32 len = it->waiting < room ? it->waiting : room;
        if (it->guest == LIAR) {
            it->waiting--;
            it->taken++;
            lie(it);
            return;
        }
        copy(queues[1].buffers[queues[1].given % RING] + HEADER, it->bytes, len);
        to->sent += len;
        it->waiting -= len;
        copy(it->bytes, it->bytes + len, it->waiting);
        if (it->guest != COUNT)
            it->taken += len;
        send(to, DATA, 0, len, 0);
    } else if (it->ends & 2 && !it->waiting && !it->passed_end) {
        /* Nothing more comes, and all has been sent. */
        it->passed_end = 1;
        send(to, SHUTDOWN, to == it || to->passed_end ? 3 : 2, 0, 0);
        if (to == it)
            it->open = 0;
    } else if (to != it && it->passed_end == 1 && to->passed_end) {
        it->passed_end = 2;
        send(to, SHUTDOWN, 3, 0, 0);
    } else if (it->taken - it->told >= ROOM / 2) {
        send(it, CREDIT_UPDATE, 0, 0, 0);
    }
}

static void set_up(u32 index) {
    struct queue *queue = &queues[index];
    *reg(0x30) = index;
    *reg(0x38) = RING;
    u64 places[] = {(u64)queue->descriptors, (u64)&queue->available, (u64)&queue->used};
    for (u32 i = 0; i < 3; i++) {
        *reg(0x80 + 0x10 * i) = (u32)places[i];
        *reg(0x84 + 0x10 * i) = places[i] >> 32;
    }
    for (u32 i = 0; i < RING; i++)
        queue->descriptors[i] = (struct descriptor){(u64)queue->buffers[i], HEADER + BUFFER, index ? 0 : 2, 0};
    *reg(0x44) = 1;
}

__attribute__((used)) void start(void) {
    if (*reg(0) != 0x74726976 || *reg(8) != 19) {
        print("no socket device\n");
        for (;;)
            __asm__ volatile("hlt");
    }
    *reg(0x70) = 0;
    *reg(0x70) = 3;
    *reg(0x24) = 1;
    *reg(0x20) = 1; /* VERSION_1 */
    *reg(0x24) = 0;
    *reg(0x20) = 0;
    *reg(0x70) = 11;
    set_up(0);
    set_up(1);
    *reg(0x70) = 15;
    for (u32 i = 0; i < RING; i++)
        give(0, i, HEADER + BUFFER);
    print("ready\n");
    for (;;) {
        struct queue *in = &queues[0];
        while (in->seen != in->used.index) {
            u16 descriptor = in->used.ring[in->seen++ % RING].id;
            heard((struct header *)in->buffers[descriptor]);
            give(0, descriptor, HEADER + BUFFER);
        }
        for (u32 i = 0; i < CONNECTIONS; i++)
            if (connections[i].there)
                work(&connections[i]);
        __asm__ volatile("pause" : : : "memory");
    }
}

__asm__(".globl entry\nentry: lea stack_end(%rip), %rsp\n call start\n.bss\n.balign 16\n.skip 16384\nstack_end:\n.text\n");
