/* loadgen - a closed-loop load generator: one thread, epoll.
 *
 *   --mode http   POST the body, read the whole answer, again
 *   --mode sse    POST the body, read an SSE stream up to "data: [DONE]", or to data that holds a --marker, again
 *   --mode ws     WebSocket handshake; then send the body as one text frame, read text frames until one
 *                 holds a --marker (good) or a --fail-marker (counted as truncated), again
 *   --mode idle   open --connections of --idle-proto (tcp, http, sse, ws), hold them --duration seconds, answer
 *                 pings; one that gets another status than 200 or 101 is not held, one that is closed is early
 *
 * Each %ID% in the body becomes 32 hex digits that no other request has: the time this run started, its
 * process id, and a counter over all its connections. So the length of a body is always the same.
 *
 * With several --key each connection has the next of them, as a bearer token.
 *
 * SSE and WS deltas (the JSON string after --seq-key) must be, joined, the digits 00010002...: see mockllm.
 * Measured are only the requests that start after ramp + warmup; with --drop-after K a stream is closed by
 * the client after K deltas. With --once a connection asks once, whatever it gets. SIGTERM ends a run at once,
 * with its numbers. `refuse_*_ms`: from connect() to the whole answer of another status than 200, or to the
 * WebSocket's --fail-marker or close frame before the first delta. `lost`: requests that were sent, at least
 * in part, and whose answer did not come whole (neither those left by --drop-after, nor those unfinished at
 * the end). All latencies are in ms.
 *
 * --tls: the server speaks TLS; its certificate is not looked at.
 *
 * --samples FILE gets every measured time as it is, as pairs of 32-bit numbers: what it is (1 a whole answer, 2 from
 * a request to the first event of any kind, 3 between two events), and 100 ns. `stuttering`: streams with a gap of
 * more than --max-gap ms between two events of any kind. */
#include "common.h"

enum { M_HTTP, M_SSE, M_WS, M_IDLE };
enum { S_NEW, S_CONNECT, S_HANDSHAKE, S_SEND, S_HEAD, S_BODY, S_WSREAD, S_HOLD, S_OFF };

typedef struct conn {
    SSL *ssl;                                   /* NULL: plain TCP */
    int fd, state, want_out, status, close_after;
    const char *out, *req; size_t out_len, out_pos;     /* req: the head and body, or the handshake */
    char *own;                                  /* its copy of the request, where that has ids */
    int64_t left;                               /* body bytes to come; -1: until close; -2: chunked */
    int ck_state; size_t ck_left;               /* chunked decoder: 0 size line, 1 data, 2 CRLF, 3 last */
    char *acc; size_t acc_len, acc_cap;         /* partial head, size line or frame */
    char *line; size_t line_len, line_cap;      /* partial SSE line or fragmented WS message */
    uint64_t t_wake, t0, t_last, t_conn;
    uint64_t t_event, widest;                   /* the last event of any kind; the widest gap between two */
    int measured, asking, done, tokens, digit, acc_dig, bad;
} conn;

static int mode = M_HTTP, proto = M_SSE, conns = 1, expect = 0, drop_after = 0, stamp = 0, once = 0, json = 0, nmark = 0, nfail = 0, marked = 0;
static long count = 0;
#ifdef TLS
static SSL_CTX *tls;
#endif
static double duration = 10, ramp = 0, warmup = 0, timeout_s = 60, drain = 10;
static const char *host = "127.0.0.1", *path = "/v1/chat/completions", *key = "\"content\":", *marks[8], *fails[8];
static int port = 9100, ep, live, opened, off;       /* off: connections that will not ask again */
static volatile sig_atomic_t told;              /* SIGTERM has come */
static char *reqs[8], *keys[8], *frame; static int nkeys; static size_t req_len, frame_len, frame_head, body_len;
#define ID_LEN 32
static size_t ids[16]; static int nids;         /* where they lie in the body */
static struct sockaddr_in addr;
static uint64_t T0, t_meas, t_stop;             /* start; measuring begins; no new requests after */

static hist h_lat, h_ttft, h_gap, h_conn, h_transit, h_refuse;
static struct {
    uint64_t started, ok, tokens, events, bytes, truncated, seq_bad, io, connect, timeout, dropped, early, unfinished, lost, stuttering;
    uint64_t status[600], all_done;
} st;
static uint64_t *drop_t; static size_t ndrop;
static FILE *samples; static double max_gap_ms = 0;
enum { WHOLE = 1, FIRST, GAP };

static void sample(uint32_t what, uint64_t ns) {
    uint32_t pair[2] = { what, (uint32_t)(ns / 100) };
    if (samples && fwrite(pair, sizeof pair, 1, samples) != 1) die("--samples: %s", strerror(errno));
}

static void start_request(conn *c);
static void lost(conn *c);

/* ---- connection handling ---------------------------------------------------------------------- */
static void want(conn *c, int out) {
    if (c->want_out == out) return;
    epoll_ctl(ep, EPOLL_CTL_MOD, c->fd, &(struct epoll_event){ .events = EPOLLIN | (out ? EPOLLOUT : 0), .data.ptr = c });
    c->want_out = out;
}
static void shut(conn *c, double again_in) {    /* close; come back after a while (<0: never) */
#ifdef TLS
    SSL_free(c->ssl);
#endif
    c->ssl = NULL;
    if (c->fd >= 0) { close(c->fd); c->fd = -1; live--; }
    st.lost += c->asking, c->asking = 0;
    off += again_in < 0;
    c->acc_len = c->line_len = 0;
    c->state = again_in < 0 ? S_OFF : S_NEW;
    c->t_wake = now_ns() + (uint64_t)((again_in < 0 ? 0 : again_in) * 1e9);
}
static void append(char **b, size_t *len, size_t *cap, const char *p, size_t n) {
    if (*len + n + 1 > *cap) *b = xrealloc(*b, *cap = (*len + n) * 2 + 64);
    memcpy(*b + *len, p, n);
    (*b)[*len += n] = 0;
}
static void flush_out(conn *c) {
    while (c->out_pos < c->out_len) {
        ssize_t n = transmit(c->fd, c->ssl, c->out + c->out_pos, c->out_len - c->out_pos);
        if (n < 0 && errno == EAGAIN) { want(c, 1); return; }
        if (n < 0) { st.io++; shut(c, 0.05); return; }
        c->out_pos += n;
    }
    want(c, 0);
    if (c->state == S_SEND) c->state = S_HEAD;
}
static void send_bytes(conn *c, const char *b, size_t n, int state) {
    c->out = b, c->out_len = n, c->out_pos = 0, c->state = state;
    flush_out(c);
}
static void open_conn(conn *c) {
    int one = 1;
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (c->fd < 0) die("socket: %s", strerror(errno));
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (conns > 10000) {    /* one source address has but 28,000 ports, and connect() gets slow at half of them */
        static unsigned turn;
        struct sockaddr_in src = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK + turn++ % 4) };
        setsockopt(c->fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &one, sizeof one);
        if (bind(c->fd, (void *)&src, sizeof src)) die("bind: %s", strerror(errno));
    }
    c->t_conn = now_ns(), c->want_out = 1, c->status = 0, c->acc_len = c->line_len = 0, live++;
    int r = connect(c->fd, (void *)&addr, sizeof addr);
    if (r && errno != EINPROGRESS) { st.connect++; shut(c, 0.2); return; }
    c->state = S_CONNECT;
    epoll_ctl(ep, EPOLL_CTL_ADD, c->fd, &(struct epoll_event){ .events = EPOLLIN | EPOLLOUT, .data.ptr = c });
}
static void hold(conn *c) { c->state = S_HOLD; opened++; }

static void connected(conn *c) {
    int e = 0; socklen_t l = sizeof e;
    getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &e, &l);
    if (e) { st.connect++; shut(c, 0.2); return; }
#ifdef TLS
    if (tls) {                                  /* what is written first does the handshake */
        c->ssl = SSL_new(tls);
        SSL_set_fd(c->ssl, c->fd);
        SSL_set_connect_state(c->ssl);
    }
#endif
    if (mode == M_IDLE && proto == M_IDLE) { hist_add(&h_conn, now_ns() - c->t_conn); want(c, 0); hold(c); return; }
    if (mode == M_WS || (mode == M_IDLE && proto == M_WS)) { send_bytes(c, c->req, req_len, S_HANDSHAKE); return; }
    hist_add(&h_conn, now_ns() - c->t_conn);
    start_request(c);
}

static int may_start(uint64_t now) { return now < t_stop && (!count || (long)st.started < count); }

static const unsigned char mask[4] = { 0x12, 0x34, 0x56, 0x78 };       /* client frames are masked */

/* The bytes of the next request: shared, or a copy of this connection's own with a fresh id in it. (The
 * copy of the request before may be overwritten: it was sent before it was answered.) */
static const char *next_request(conn *c, const char *from, size_t len, size_t head, int masked) {
    static uint64_t began, turn;
    char id[ID_LEN + 1];
    if (!nids) return from;
    if (!began) {
        struct timespec t;
        clock_gettime(CLOCK_REALTIME, &t);
        began = (uint64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
    }
    if (!c->own) memcpy(c->own = xrealloc(NULL, len), from, len);
    snprintf(id, sizeof id, "%014lx%08x%010lx", began & 0xffffffffffffff, (unsigned)getpid(), ++turn & 0xffffffffff);
    for (int i = 0; i < nids; i++)
        for (size_t k = 0; k < ID_LEN; k++)
            c->own[head + ids[i] + k] = (char)(id[k] ^ (masked ? mask[(ids[i] + k) & 3] : 0));
    return c->own;
}

static void start_request(conn *c) {
    uint64_t now = now_ns();
    if (mode != M_IDLE && !may_start(now)) { shut(c, -1); return; }
    st.started++;
    c->asking = mode != M_IDLE;
    c->t0 = c->t_last = now, c->measured = now >= t_meas, c->t_event = c->widest = 0;
    c->done = c->tokens = c->digit = c->acc_dig = c->bad = 0, c->status = 0, c->line_len = 0;
    if (mode == M_WS) send_bytes(c, next_request(c, frame, frame_len, frame_head, 1), frame_len, S_WSREAD);
    else send_bytes(c, next_request(c, c->req, req_len, req_len - body_len, 0), req_len, S_SEND);
}

/* The request is over. good: it got everything it had to. reuse: the connection may serve another. */
static void end_request(conn *c, int good, int reuse) {
    uint64_t now = now_ns();
    if (c->status >= 0 && c->status < 600) st.status[c->status]++;
    if (good) st.all_done++;
    else if (c->status >= 400 || (mode == M_WS && !c->tokens)) hist_add(&h_refuse, now - c->t_conn);
    else st.lost++;
    c->asking = 0;
    if (c->measured && good) { st.ok++; hist_add(&h_lat, now - c->t0); sample(WHOLE, now - c->t0); }
    if (c->measured && max_gap_ms > 0 && c->widest > (uint64_t)(max_gap_ms * 1e6)) st.stuttering++;
    if (mode != M_HTTP && (c->status == 200 || c->status == 101)) {
        if (!good) st.truncated++;
        else if (c->bad || (expect && c->tokens != expect)) st.seq_bad++;
    }
    if (once || !may_start(now)) shut(c, -1);
    else if (!reuse || c->close_after) shut(c, 0);      /* opened anew by the next tick() */
    else start_request(c);
}

/* ---- one SSE data line or WS message ------------------------------------------------------------- */
static void on_event(conn *c, const char *p, size_t n) {
    const char *k = p, *end = p + n;
    int before = c->tokens;
    while ((k = memmem(k, end - k, key, strlen(key)))) {        /* digits: groups of four, counting up */
        for (k += strlen(key); k < end && *k == ' ';) k++;
        if (k >= end || *k != '"') continue;
        for (k++; k < end && *k != '"'; k++) {
            if (*k < '0' || *k > '9') continue;
            c->acc_dig = c->acc_dig * 10 + *k - '0';
            if (++c->digit == 4) {
                if (c->acc_dig != ++c->tokens % 10000) c->bad = 1;
                c->digit = c->acc_dig = 0;
            }
        }
    }
    if (c->tokens == before) return;
    uint64_t now = now_ns();
    if (c->measured || now >= t_meas) {                 /* rates count what arrives in the window */
        if (now <= t_stop) st.events++, st.tokens += c->tokens - before;
    }
    if (c->measured) {
        hist_add(before ? &h_gap : &h_ttft, now - (before ? c->t_last : c->t0));
        const char *s = stamp ? memmem(p, n, "\"fp_", 4) : NULL;
        if (s) { uint64_t t = strtoull(s + 4, NULL, 16); if (t && now > t) hist_add(&h_transit, now - t); }
    }
    c->t_last = now;
}

/* Returns 0 when the connection has been given up. */
static int maybe_drop(conn *c) {
    if (!drop_after || c->tokens < drop_after) return 1;
    drop_t = xrealloc(drop_t, (ndrop + 1) * sizeof *drop_t);
    drop_t[ndrop++] = now_ns();
    st.dropped++, c->asking = 0;
    shut(c, may_start(now_ns()) ? 0 : -1);
    return 0;
}

/* Whether data that holds one of the --marker ends a stream. */
static int ends(const char *p, size_t n) {
    for (int i = 0; marked && i < nmark; i++) if (memmem(p, n, marks[i], strlen(marks[i]))) return 1;
    return 0;
}

static void on_line(conn *c, const char *p, size_t n) {
    if (n && p[n - 1] == '\r') n--;
    if (n < 6 || memcmp(p, "data:", 5)) return;
    if (c->measured) {
        uint64_t now = now_ns(), gap = now - (c->t_event ? c->t_event : c->t0);
        sample(c->t_event ? GAP : FIRST, gap);
        if (c->t_event && gap > c->widest) c->widest = gap;
        c->t_event = now;
    }
    if (n <= 14 && memmem(p, n, "[DONE]", 6)) c->done = 1;
    else if (ends(p, n)) c->done = 1;
    else on_event(c, p, n);
}

static void on_body(conn *c, const char *p, size_t n) {
    if (mode == M_HTTP || c->status != 200) return;
    while (n) {
        const char *nl = memchr(p, '\n', n);
        size_t k = nl ? (size_t)(nl - p) : n;
        if (!nl) { append(&c->line, &c->line_len, &c->line_cap, p, k); return; }
        if (c->line_len) {
            append(&c->line, &c->line_len, &c->line_cap, p, k);
            on_line(c, c->line, c->line_len);
            c->line_len = 0;
        } else on_line(c, p, k);
        p += k + 1, n -= k + 1;
    }
}

/* ---- HTTP answers -------------------------------------------------------------------------------- */
static int parse_head(conn *c, const char *b, const char *e) {
    c->status = e - b > 12 ? atoi(b + 9) : 0;
    c->left = -1, c->ck_state = 0, c->close_after = 0;
    for (const char *l = b; l && l < e; l = memchr(l, '\n', e - l), l = l ? l + 1 : l) {
        if (!strncasecmp(l, "content-length:", 15)) c->left = strtoll(l + 15, NULL, 10);
        else if (!strncasecmp(l, "transfer-encoding:", 18) && strcasestr(l + 18, "chunked") < e) c->left = -2;
        else if (!strncasecmp(l, "connection: close", 17)) c->close_after = 1;
    }
    return c->status;
}
static void complete(conn *c) { end_request(c, mode == M_SSE ? c->done : c->status == 200, c->left != -1); }

/* Feed n bytes of a response; returns 0 when the request ended or the connection is gone. */
static int feed(conn *c, const char *p, size_t n) {
    if (c->state == S_HEAD) {
        append(&c->acc, &c->acc_len, &c->acc_cap, p, n);
        char *e = memmem(c->acc, c->acc_len, "\r\n\r\n", 4);
        if (!e) return 1;
        parse_head(c, c->acc, e + 2);
        if (mode == M_IDLE) {
            if (c->status == 200) hold(c);
            else { if (c->status >= 0 && c->status < 600) st.status[c->status]++; shut(c, -1); }
            return 0;
        }
        c->state = S_BODY;
        size_t rest = c->acc_len - (e + 4 - c->acc);    /* go on with what follows the head */
        p += n - rest, n = rest, c->acc_len = 0;
    }
    if (c->left >= 0) {
        size_t k = n < (size_t)c->left ? n : (size_t)c->left;
        on_body(c, p, k);
        if (!(c->left -= k)) { complete(c); return 0; }
    } else if (c->left == -1) on_body(c, p, n);
    else while (n) {
        if (c->ck_state == 1) {                         /* chunk data */
            size_t k = n < c->ck_left ? n : c->ck_left;
            on_body(c, p, k);
            p += k, n -= k;
            if (!(c->ck_left -= k)) c->ck_state = 2;
            continue;
        }
        char ch = *p++;                                 /* size line, or the CRLF after data */
        n--;
        if (c->ck_state == 2) { if (ch == '\n') c->ck_state = 0; }
        else if (ch == '\n') {
            c->acc_len = c->acc_len ? (c->acc[c->acc_len] = 0, c->acc_len) : 0;
            if (c->ck_state == 3) { if (!c->acc_len) { complete(c); return 0; } c->acc_len = 0; continue; }
            c->ck_left = strtoul(c->acc_len ? c->acc : "0", NULL, 16);
            c->acc_len = 0;
            c->ck_state = c->ck_left ? 1 : 3;
        } else if (ch != '\r') append(&c->acc, &c->acc_len, &c->acc_cap, &ch, 1);
    }
    return maybe_drop(c);
}

/* ---- WebSocket ----------------------------------------------------------------------------------- */
static size_t ws_frame(char *to, int op, const char *p, size_t n) {
    size_t k = 0;
    to[k++] = (char)(0x80 | op);
    if (n < 126) to[k++] = (char)(0x80 | n);
    else if (n < 65536) to[k++] = (char)0xfe, to[k++] = (char)(n >> 8), to[k++] = (char)n;
    else { to[k++] = (char)0xff; for (int i = 7; i >= 0; i--) to[k++] = (char)(n >> (8 * i)); }
    memcpy(to + k, mask, 4), k += 4;
    for (size_t i = 0; i < n; i++) to[k + i] = (char)(p[i] ^ mask[i & 3]);
    return k + n;
}

static int ws_message(conn *c, const char *p, size_t n) {
    on_event(c, p, n);
    if (!maybe_drop(c)) return 0;
    for (int i = 0; i < nmark; i++)
        if (memmem(p, n, marks[i], strlen(marks[i]))) { c->status = 101; end_request(c, 1, 1); return c->fd >= 0; }
    for (int i = 0; i < nfail; i++)
        if (memmem(p, n, fails[i], strlen(fails[i]))) { c->status = 101; end_request(c, 0, 0); return 0; }
    return 1;
}

/* Uses whole frames of b; returns the bytes used, or -1 when the connection is gone. */
static long ws_frames(conn *c, char *b, size_t n) {
    size_t used = 0;
    while (n - used >= 2) {
        unsigned char *f = (unsigned char *)b + used;
        size_t h = 2, len = f[1] & 127;
        if (len == 126) { if (n - used < 4) break; len = f[2] << 8 | f[3]; h = 4; }
        else if (len == 127) { if (n - used < 10) break; len = 0; for (int i = 2; i < 10; i++) len = len << 8 | f[i]; h = 10; }
        if (n - used < h + len) break;
        char *p = (char *)f + h;
        int op = f[0] & 15, fin = f[0] & 128;
        used += h + len;
        if (op == 9 && len < 126) { char o[140]; if (transmit(c->fd, c->ssl, o, ws_frame(o, 10, p, len)) < 0) st.io++; }
        else if (op == 8 && c->state == S_HOLD) { lost(c); return -1; }
        else if (op == 8) { c->status = 101; end_request(c, 0, 0); return -1; }
        else if (op <= 2 && (mode == M_WS && c->state == S_WSREAD)) {
            if (fin && !c->line_len) { if (!ws_message(c, p, len)) return -1; }
            else {
                append(&c->line, &c->line_len, &c->line_cap, p, len);
                if (fin) { size_t l = c->line_len; c->line_len = 0; if (!ws_message(c, c->line, l)) return -1; }
            }
        }
    }
    return used;
}

static void ws_input(conn *c, char *b, size_t n) {
    if (c->acc_len || c->state == S_HANDSHAKE) { append(&c->acc, &c->acc_len, &c->acc_cap, b, n); b = c->acc, n = c->acc_len; }
    size_t used = 0;
    if (c->state == S_HANDSHAKE) {
        char *e = memmem(b, n, "\r\n\r\n", 4);
        if (!e) return;
        int s = atoi(b + 9);
        if (s != 101) { 
            if (s >= 0 && s < 600) st.status[s]++;
            hist_add(&h_refuse, now_ns() - c->t_conn);
            st.io++;
            shut(c, once ? -1 : 0.2);
            return;
        }
        hist_add(&h_conn, now_ns() - c->t_conn);
        used = e + 4 - b;
        if (mode == M_IDLE) hold(c); else start_request(c);
        if (c->fd < 0) return;
    }
    long k = ws_frames(c, b + used, n - used);
    if (k < 0) return;
    used += k;
    if (b == c->acc) memmove(c->acc, c->acc + used, c->acc_len = n - used);
    else if (used < n) append(&c->acc, &c->acc_len, &c->acc_cap, b + used, n - used);
}

/* ---- events -------------------------------------------------------------------------------------- */
static void lost(conn *c) {                     /* the peer closed, or an error */
    if (c->state == S_HOLD) { st.early++; opened--; shut(c, -1); return; }
    if (c->state == S_BODY && c->left == -1) { complete(c); return; }
    if (c->state == S_BODY || (c->state == S_WSREAD && c->tokens)) { if (c->state == S_WSREAD) c->status = 101; end_request(c, 0, 0); return; }
    st.io++;
    shut(c, may_start(now_ns()) || mode == M_IDLE ? 0.05 : -1);
}

static int read_once(conn *c) {                 /* 0: nothing is left to read now */
    static char buf[1 << 18];
    ssize_t n = receive(c->fd, c->ssl, buf, sizeof buf);
    if (n < 0 && errno == EAGAIN) return 0;
    if (n <= 0) { lost(c); return 0; }
    st.bytes += n;
    if (c->state == S_HANDSHAKE || c->state == S_WSREAD || (c->state == S_HOLD && proto == M_WS)) ws_input(c, buf, n);
    else if (c->state == S_HEAD || c->state == S_BODY) feed(c, buf, n);
    return c->fd >= 0;
}

static void readable(conn *c) {                 /* OpenSSL may keep what the socket no longer has */
    while (read_once(c) && c->ssl) continue;
}

static void tick(conn *all, uint64_t now) {     /* ramp, reconnects and time-outs */
    for (int i = 0; i < conns; i++) {
        conn *c = all + i;
        if (c->state == S_NEW && c->t_wake <= now) { if (mode == M_IDLE || may_start(now)) open_conn(c); else c->state = S_OFF, off++; }
        else if (c->state > S_CONNECT && c->state < S_HOLD && now > c->t0 + (uint64_t)(timeout_s * 1e9) &&
                 now > c->t_last + (uint64_t)(timeout_s * 1e9) && now > c->t_conn + (uint64_t)(timeout_s * 1e9)) { st.timeout++; shut(c, 0); }
    }
}

static char *slurp(const char *f, size_t *n) {
    FILE *h = fopen(f, "rb");
    if (!h) die("%s: %s", f, strerror(errno));
    char *b = malloc(1 << 24);
    *n = fread(b, 1, (1 << 24) - 1, h);
    b[*n] = 0;
    fclose(h);
    return b;
}

/* The body with every %ID% widened to its ID_LEN digits; notes where they lie. */
static char *find_ids(const char *b, size_t n, size_t *len) {
    char *to = xrealloc(NULL, n * (ID_LEN / 4) + 1), *t = to;
    for (const char *p = b; p < b + n;)
        if (b + n - p >= 4 && !memcmp(p, "%ID%", 4)) {
            if (nids == (int)(sizeof ids / sizeof *ids)) die("too many %%ID%% in the body");
            ids[nids++] = t - to;
            memset(t, '0', ID_LEN);
            t += ID_LEN, p += 4;
        } else *t++ = *p++;
    *len = t - to;
    return to;
}

static void on_term(int sig) { told = sig; }

static int fields;
static void out(const char *k, const char *fmt, ...) {
    va_list a;
    va_start(a, fmt);
    printf(json ? "%s\"%s\":" : "%s%-18s ", json ? (fields++ ? "," : "{") : "", k);
    vprintf(fmt, a);
    if (!json) putchar('\n');
    va_end(a);
}
static void out_hist(const char *name, hist *h) {
    static const double p[] = { 50, 90, 95, 99, 99.9 };
    static const char *pn[] = { "p50", "p90", "p95", "p99", "p999" };
    char k[64];
    for (int i = 0; i < 5; i++) { snprintf(k, sizeof k, "%s_%s_ms", name, pn[i]); out(k, "%.3f", hist_ms(h, p[i])); }
    snprintf(k, sizeof k, "%s_max_ms", name);
    out(k, "%.3f", h->max / 1e6);
}

int main(int argc, char **argv) {
    static const struct option o[] = { {"mode",1,0,'m'}, {"host",1,0,'H'}, {"port",1,0,'p'}, {"path",1,0,'P'}, {"header",1,0,'h'}, {"key",1,0,'K'},
        {"body-file",1,0,'b'}, {"connections",1,0,'c'}, {"duration",1,0,'d'}, {"count",1,0,'n'}, {"ramp",1,0,'r'}, {"warmup",1,0,'w'},
        {"timeout",1,0,'t'}, {"drain",1,0,'D'}, {"marker",1,0,'M'}, {"fail-marker",1,0,'F'}, {"seq-key",1,0,'k'}, {"expect",1,0,'e'}, {"drop-after",1,0,'x'},
        {"idle-proto",1,0,'i'}, {"stamp",0,0,'T'}, {"samples",1,0,'s'}, {"max-gap",1,0,'g'}, {"once",0,0,'1'}, {"json",0,0,'j'},
        {"tls",0,0,'L'}, {0} };
    char *hdr = strdup(""), *body = NULL; size_t blen = 0; int k; const char *meth = "POST";
    while ((k = getopt_long(argc, argv, "", o, NULL)) != -1) switch (k) {
        case 'm': mode = !strcmp(optarg, "sse") ? M_SSE : !strcmp(optarg, "ws") ? M_WS : !strcmp(optarg, "idle") ? M_IDLE : M_HTTP; break;
        case 'i': proto = !strcmp(optarg, "ws") ? M_WS : !strcmp(optarg, "tcp") ? M_IDLE : !strcmp(optarg, "http") ? M_HTTP : M_SSE; break;
        case 'H': host = optarg; break;
        case 'p': port = atoi(optarg); break;
        case 'P': path = optarg; break;
        case 'h': { char *x; if (asprintf(&x, "%s%s\r\n", hdr, optarg) < 0) return 1; free(hdr); hdr = x; } break;
        case 'K': if (nkeys < 8) keys[nkeys++] = optarg; break;
        case 'b': body = slurp(optarg, &blen); break;
        case 'c': conns = atoi(optarg); break;
        case 'd': duration = atof(optarg); break;
        case 'n': count = atol(optarg); break;
        case 'r': ramp = atof(optarg); break;
        case 'w': warmup = atof(optarg); break;
        case 't': timeout_s = atof(optarg); break;
        case 'D': drain = atof(optarg); break;
        case 'M': if (nmark < 8) marks[nmark++] = optarg; break;
        case 'F': if (nfail < 8) fails[nfail++] = optarg; break;
        case 'k': { char *x; if (asprintf(&x, "\"%s\":", optarg) < 0) return 1; key = x; } break;
        case 'e': expect = atoi(optarg); break;
        case 'x': drop_after = atoi(optarg); break;
        case 'T': stamp = 1; break;
        case 's': if (!(samples = fopen(optarg, "wb"))) die("%s: %s", optarg, strerror(errno)); break;
        case 'g': max_gap_ms = atof(optarg); break;
        case '1': once = 1; break;
        case 'j': json = 1; break;
#ifdef TLS
        case 'L':
            tls = SSL_CTX_new(TLS_client_method());
            SSL_CTX_set_mode(tls, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
            break;
#endif
        default: die("usage: loadgen --mode http|sse|ws|idle [--host H] --port P [--path P] [--header 'K: V']... [--key KEY]...\n"
            "  [--body-file F] [--connections C] [--duration S] [--count N] [--ramp S] [--warmup S] [--timeout S] [--drain S] [--expect TOKENS]\n"
            "  [--marker TEXT]... [--fail-marker TEXT]... [--seq-key content] [--drop-after K] [--idle-proto tcp|http|sse|ws] [--stamp] [--samples FILE] [--max-gap MS] [--once] [--json]\n  [--tls]");
    }
    marked = nmark > 0;
    if (!nmark) marks[nmark++] = "\"status\":\"complete\"", marks[nmark++] = "\"status\": \"complete\"";
    if (!nfail) fails[nfail++] = "\"status\":\"error\"", fails[nfail++] = "\"status\": \"error\"";
    if (!body) {
        body = mode == M_SSE || mode == M_WS || (mode == M_IDLE && proto == M_SSE)
            ? "{\"model\":\"mock-model\",\"stream\":true,\"messages\":[{\"role\":\"user\",\"content\":\"Hello, how are you?\"}]}"
            : "{\"model\":\"mock-model\",\"messages\":[{\"role\":\"user\",\"content\":\"Hello, how are you?\"}]}";
        blen = strlen(body);
    }
    if (mode == M_IDLE && proto == M_HTTP) meth = "GET", blen = 0;
    body = find_ids(body, blen, &blen);
    body_len = blen;
    for (int i = 0; i < (nkeys ? nkeys : 1); i++) {
        char *req = reqs[i] = malloc(blen + strlen(hdr) + strlen(path) + (nkeys ? strlen(keys[i]) : 0) + 512), auth[256] = "";
        if (nkeys && snprintf(auth, sizeof auth, "Authorization: Bearer %s\r\n", keys[i]) >= (int)sizeof auth) die("--key is too long");
        if (nkeys && strlen(keys[i]) != strlen(keys[0])) die("every --key must be as long as the first");
        if (mode == M_WS || (mode == M_IDLE && proto == M_WS)) {
            req_len = sprintf(req, "GET %s HTTP/1.1\r\nHost: %s:%d\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n%s%s\r\n", path, host, port, hdr, auth);
            frame = malloc(blen + 32);
            frame_len = ws_frame(frame, 1, body, blen);
            frame_head = frame_len - blen;
        } else {
            req_len = sprintf(req, "%s %s HTTP/1.1\r\nHost: %s:%d\r\nContent-Type: application/json\r\n%s%sContent-Length: %zu\r\n\r\n",
                              meth, path, host, port, hdr, auth, blen);
            memcpy(req + req_len, body, blen);
            req_len += blen;
        }
    }
    signal(SIGPIPE, SIG_IGN);
    signal(SIGTERM, on_term);
    raise_nofile();
    addr = (struct sockaddr_in){ .sin_family = AF_INET, .sin_port = htons(port) };
    if (inet_pton(AF_INET, host, &addr.sin_addr) != 1) die("--host takes an IPv4 address");
    ep = epoll_create1(EPOLL_CLOEXEC);
    conn *all = calloc(conns, sizeof *all);
    T0 = now_ns();
    t_meas = T0 + (uint64_t)((ramp + warmup) * 1e9);
    t_stop = t_meas + (uint64_t)(duration * 1e9);
    for (int i = 0; i < conns; i++) all[i].fd = -1, all[i].req = reqs[nkeys ? i % nkeys : 0], all[i].t_wake = T0 + (uint64_t)(ramp * 1e9 * i / conns);
    uint64_t now = T0, next = 0, t_end = t_stop + (uint64_t)(mode == M_IDLE ? 0 : drain * 1e9);
    struct rusage ru0, ru;
    int started_meas = 0;
    getrusage(RUSAGE_SELF, &ru0);
    while (now < t_end && !told) {
        if (now >= next) {
            tick(all, now);
            next = now + 5000000;
            if (!started_meas && now >= t_meas) { getrusage(RUSAGE_SELF, &ru0); started_meas = 1; }
        }
        if (mode != M_IDLE && ((!live && !may_start(now)) || off == conns)) break;
        struct epoll_event ev[512];
        int n = ep_wait(ep, ev, 512, 5000000);
        for (int i = 0; i < n; i++) {
            conn *c = ev[i].data.ptr;
            if (c->fd < 0) continue;
            if (c->state == S_CONNECT && ev[i].events & (EPOLLOUT | EPOLLERR | EPOLLHUP)) connected(c);
            else if (ev[i].events & EPOLLOUT) flush_out(c);
            if (c->fd >= 0 && ev[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR) && c->state != S_CONNECT) readable(c);
        }
        now = now_ns();
    }
    uint64_t tend = now < t_stop ? now : t_stop;
    double secs = (tend > t_meas ? tend - t_meas : 1) / 1e9, whole = (now - (now < t_meas ? T0 : t_meas)) / 1e9;
    getrusage(RUSAGE_SELF, &ru);
    for (int i = 0; i < conns; i++) if (all[i].fd >= 0 && all[i].state > S_CONNECT && all[i].state < S_HOLD) st.unfinished++;
    double cpu = (ru.ru_utime.tv_sec - ru0.ru_utime.tv_sec) + (ru.ru_stime.tv_sec - ru0.ru_stime.tv_sec)
               + (ru.ru_utime.tv_usec - ru0.ru_utime.tv_usec) / 1e6 + (ru.ru_stime.tv_usec - ru0.ru_stime.tv_usec) / 1e6;
    out("mode", json ? "\"%s\"" : "%s", mode == M_HTTP ? "http" : mode == M_SSE ? "sse" : mode == M_WS ? "ws" : "idle");
    out("connections", "%d", conns);
    out("seconds", "%.3f", secs);
    out("started", "%lu", st.started);
    out("ok_total", "%lu", st.all_done);
    if (mode == M_IDLE) { out("held", "%d", opened); out("closed_early", "%lu", st.early); }
    else {
        out("ok", "%lu", st.ok);
        out("per_second", "%.1f", st.ok / secs);
        out_hist("latency", &h_lat);
        out("refused", "%lu", h_refuse.n);
        out_hist("refuse", &h_refuse);
        out("lost", "%lu", st.lost);
    }
    out_hist("connect", &h_conn);
    if (mode == M_SSE || mode == M_WS) {
        out("chunks_per_second", "%.0f", st.tokens / secs);
        out("events_per_second", "%.0f", st.events / secs);
        out_hist("ttft", &h_ttft);
        out_hist("gap", &h_gap);
        if (stamp) out_hist("transit", &h_transit);
        out("stuttering", "%lu", st.stuttering);
        out("truncated", "%lu", st.truncated);
        out("seq_bad", "%lu", st.seq_bad);
        out("unfinished", "%lu", st.unfinished);
    }
    out("connect_errors", "%lu", st.connect);
    out("io_errors", "%lu", st.io);
    out("timeouts", "%lu", st.timeout);
    if (drop_after) {
        out("dropped", "%lu", st.dropped);
        if (json) { printf(",\"drop_times_ns\":["); for (size_t i = 0; i < ndrop; i++) printf("%s%lu", i ? "," : "", drop_t[i]); printf("]"); }
    }
    if (json) {
        printf(",\"status\":{");
        for (int i = 0, first = 1; i < 600; i++) if (st.status[i]) { printf("%s\"%d\":%lu", first ? "" : ",", i, st.status[i]); first = 0; }
        printf("}");
    } else for (int i = 0; i < 600; i++) if (st.status[i]) printf("status %-11d %lu\n", i, st.status[i]);
    if (samples && fclose(samples)) die("--samples: %s", strerror(errno));
    out("own_cpu_pct", "%.1f", 100 * cpu / whole);
    if (json) printf("}\n");
    return 0;
}
