/* Reads csq's bit-packed files (docs/format.md) with nothing but the C library, and prints what is in them.

     cc -O2 -o csq_read docs/readers/csq_read.c -lm && ./csq_read model.safetensors

   A line per quantized layer, "integers SHA256 NAME" (of its integers as little-endian int16), then a line per tensor of the
   state dict, "tensor SHA256 DTYPE [SHAPE] NAME" (of its values, little-endian). Exit code 2 and one line for any other file.
   The section numbers below are those of docs/format.md. A file is checked as far as memory safety and the MUST clauses go. */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void fail(const char *what) { fprintf(stderr, "csq_read: %s\n", what); exit(2); }
static void *get(size_t bytes) { void *p = calloc(bytes ? bytes : 1, 1); if (!p) fail("not enough memory"); return p; }

/* JSON: a tree of nodes; type is one of { [ " 0 t f n */
typedef struct node { char type, *key, *text; double number; struct node *child, *next; } node;
static const char *at, *end;
static void space(void) { while (at < end && strchr(" \t\r\n", *at)) at++; }
static void expect(char c) { space(); if (at == end || *at++ != c) fail("damaged JSON"); }

static unsigned hex4(void) {
    unsigned value = 0;
    for (int i = 0; i < 4; i++, at++) {
        const char *digits = "0123456789abcdef", *found = at < end && *at ? strchr(digits, *at | 32) : NULL;
        if (!found) fail("damaged JSON");
        value = value * 16 + (unsigned)(found - digits);
    }
    return value;
}

static char *string(void) { /* UTF-8 */
    char *text = get((size_t)(end - at) + 1), *out = text;
    expect('"');
    while (at < end && *at != '"') {
        if (*at != '\\') { *out++ = *at++; continue; }
        if (++at == end) break;
        char c = *at++;
        const char *plain = "\"\\/bfnrt", *meant = "\"\\/\b\f\n\r\t", *found = strchr(plain, c);
        if (c && found) { *out++ = meant[found - plain]; continue; }
        if (c != 'u') fail("damaged JSON");
        unsigned code = hex4();
        if (code >> 10 == 0x36) { /* the first of a surrogate pair */
            expect('\\'); expect('u');
            code = 0x10000 + ((code & 0x3FF) << 10) + (hex4() & 0x3FF);
        }
        if (code < 0x80) { *out++ = (char)code; continue; }
        if (code < 0x800) *out++ = (char)(0xC0 | code >> 6);
        else {
            if (code < 0x10000) *out++ = (char)(0xE0 | code >> 12);
            else { *out++ = (char)(0xF0 | code >> 18); *out++ = (char)(0x80 | (code >> 12 & 63)); }
            *out++ = (char)(0x80 | (code >> 6 & 63));
        }
        *out++ = (char)(0x80 | (code & 63));
    }
    expect('"');
    *out = 0;
    return realloc(text, (size_t)(out - text) + 1);
}

static node *parse(int depth) {
    node *value = get(sizeof *value), **last = &value->child;
    space();
    if (depth > 32 || at == end) fail("damaged JSON");
    value->type = *at;
    if (*at == '{' || *at == '[') {
        char close = *at++ == '{' ? '}' : ']';
        for (space(); at < end && *at != close; last = &(*last)->next) {
            char *key = NULL;
            if (value->child) { expect(','); space(); }
            if (close == '}') { key = string(); expect(':'); }
            *last = parse(depth + 1);
            (*last)->key = key;
            space();
        }
        expect(close);
    } else if (*at == '"') value->text = string();
    else if (*at == '-' || (*at >= '0' && *at <= '9')) {
        char *stop;
        value->type = '0';
        value->number = strtod(at, &stop); /* the text ends in a zero byte */
        at = stop;
    } else while (at < end && *at >= 'a' && *at <= 'z') at++; /* true, false, null */
    if (depth == 0 && (space(), at < end)) fail("damaged JSON");
    return value;
}
static node *json(const char *text, size_t length) { at = text; end = text + length; return parse(0); }
static node *find(node *object, const char *key) { /* NULL where there is none */
    node *member = object && object->type == '{' ? object->child : NULL;
    while (member && strcmp(member->key, key)) member = member->next;
    return member;
}
static node *need(node *object, const char *key, char type) {
    node *member = find(object, key);
    if (!member || member->type != type) fail("damaged manifest: a field is missing or of another type");
    return member;
}
static size_t count_of(node *value) { /* an integer from 0 to 2^40 */
    if (value->type != '0' || value->number < 0 || value->number > 1099511627776.0 || value->number != floor(value->number))
        fail("damaged manifest: a number is not a size");
    return (size_t)value->number;
}
static size_t elements(node *shape) {
    double product = 1;
    for (node *side = shape->child; side; side = side->next) product *= (double)count_of(side);
    if (product > 1099511627776.0) fail("damaged manifest: a shape that is too large");
    return (size_t)product;
}

/* DEFLATE (RFC 1951), section 4: into exactly `size` bytes, or at most those where `exact` is 0 */
static const uint8_t *source, *source_end;
static uint32_t hold; static int held;
static unsigned bits(int n) {
    for (; held < n; held += 8) {
        if (source == source_end) fail("a DEFLATE stream is cut off");
        hold |= (uint32_t)*source++ << held;
    }
    unsigned value = hold & ((1u << n) - 1);
    hold >>= n; held -= n;
    return value;
}
typedef struct { unsigned count[16], symbol[288]; } huffman;
static void build(huffman *code, const uint8_t *lengths, int n) {
    unsigned place[16] = {0}; int left = 1;
    memset(code, 0, sizeof *code);
    for (int i = 0; i < n; i++) code->count[lengths[i]]++;
    code->count[0] = 0;
    for (int l = 1; l < 16; l++) {
        if ((left = 2 * left - (int)code->count[l]) < 0) fail("a Huffman code that cannot be");
        place[l] = place[l - 1] + code->count[l - 1];
    }
    for (int i = 0; i < n; i++) if (lengths[i]) code->symbol[place[lengths[i]]++] = (unsigned)i;
}
static unsigned symbol(const huffman *code) {
    unsigned word = 0, first = 0, before = 0; /* codes of one length are consecutive numbers from `first` */
    for (int l = 1; l < 16; l++) {
        word = 2 * word + bits(1);
        if (word - first < code->count[l]) return code->symbol[before + word - first];
        before += code->count[l];
        first = 2 * (first + code->count[l]);
        if (2 * word + 1 < first) break;
    }
    fail("a Huffman code that is not in its table");
    return 0;
}
static size_t inflate(const uint8_t *data, size_t bytes, uint8_t *out, size_t size, int exact) {
    static const uint8_t order[19] = {16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15};
    size_t done = 0; unsigned last;
    source = data; source_end = data + bytes; hold = 0; held = 0;
    do {
        huffman text, distance; uint8_t lengths[320] = {0};
        last = bits(1);
        unsigned kind = bits(2);
        if (kind == 0) {
            hold = 0; held = 0;
            unsigned n = bits(16);
            if ((bits(16) ^ n) != 0xFFFF || n > size - done || n > (size_t)(source_end - source)) fail("a stored block too long");
            memcpy(out + done, source, n); source += n; done += n;
            continue;
        }
        if (kind == 3) fail("an unknown DEFLATE block");
        if (kind == 1) {
            for (int i = 0; i < 288; i++) lengths[i] = i < 144 ? 8 : i < 256 ? 9 : i < 280 ? 7 : 8;
            build(&text, lengths, 288);
            memset(lengths, 5, 30); build(&distance, lengths, 30);
        } else {
            unsigned texts = bits(5) + 257, distances = bits(5) + 1, n = bits(4) + 4, i = 0;
            for (unsigned k = 0; k < n; k++) lengths[order[k]] = (uint8_t)bits(3);
            build(&text, lengths, 19);
            memset(lengths, 0, sizeof lengths);
            while (i < texts + distances) {
                unsigned s = symbol(&text);
                uint8_t value = (uint8_t)(s < 16 ? s : 0);
                if (s == 16) { if (!i) fail("a repeated length before the first"); value = lengths[i - 1]; }
                unsigned times = s < 16 ? 1 : s == 16 ? 3 + bits(2) : s == 17 ? 3 + bits(3) : 11 + bits(7);
                if (i + times > texts + distances) fail("too many code lengths");
                while (times--) lengths[i++] = value;
            }
            build(&text, lengths, (int)texts); build(&distance, lengths + texts, (int)distances);
        }
        for (unsigned s; (s = symbol(&text)) != 256;) {
            if (s < 256) { if (done == size) fail("a DEFLATE stream longer than its shape"); out[done++] = (uint8_t)s; continue; }
            if ((s -= 257) > 28) fail("an unknown length");
            unsigned extra = s < 8 || s == 28 ? 0 : s / 4 - 1;
            unsigned length = s == 28 ? 258 : (s < 8 ? s : ((4 + s % 4) << extra)) + 3 + bits((int)extra);
            unsigned d = symbol(&distance);
            if (d > 29) fail("an unknown distance");
            extra = d < 4 ? 0 : d / 2 - 1;
            size_t back = (d < 4 ? d : ((2 + d % 2) << extra)) + 1 + bits((int)extra);
            if (back > done || length > size - done) fail("a match outside of its tensor");
            for (; length--; done++) out[done] = out[done - back];
        }
    } while (!last);
    if (source != source_end || (exact && done != size)) fail("a DEFLATE stream that does not end where its shape says");
    return done;
}

/* SHA-256 (FIPS 180-4) */
typedef struct { uint32_t state[8]; uint8_t block[64]; uint64_t bytes; } sha;
static uint32_t root(int n, double power) { /* first 32 bits of the fraction of the n-th prime's root */
    int prime = 2;
    for (;; prime++) { int d = 2; while (d * d <= prime && prime % d) d++; if (d * d > prime && n-- == 0) break; }
    double whole = pow(prime, power);
    return (uint32_t)((whole - floor(whole)) * 4294967296.0);
}
static uint32_t turn(uint32_t x, int n) { return x >> n | x << (32 - n); }
static void sha_block(sha *h) {
    static uint32_t k[64];
    uint32_t w[64], v[8];
    if (!k[0]) for (int i = 0; i < 64; i++) k[i] = root(i, 1.0 / 3);
    memcpy(v, h->state, sizeof v);
    for (int i = 0; i < 64; i++) {
        const uint8_t *b = h->block + 4 * (i & 15);
        w[i] = i < 16 ? (uint32_t)b[0] << 24 | (uint32_t)b[1] << 16 | (uint32_t)b[2] << 8 | b[3]
                      : w[i - 16] + w[i - 7] + (turn(w[i - 15], 7) ^ turn(w[i - 15], 18) ^ w[i - 15] >> 3)
                            + (turn(w[i - 2], 17) ^ turn(w[i - 2], 19) ^ w[i - 2] >> 10);
        uint32_t one = v[7] + (turn(v[4], 6) ^ turn(v[4], 11) ^ turn(v[4], 25)) + ((v[4] & v[5]) ^ (~v[4] & v[6])) + k[i] + w[i];
        uint32_t two = (turn(v[0], 2) ^ turn(v[0], 13) ^ turn(v[0], 22)) + ((v[0] & v[1]) ^ (v[0] & v[2]) ^ (v[1] & v[2]));
        memmove(v + 1, v, 7 * sizeof *v);
        v[4] += one; v[0] = one + two;
    }
    for (int i = 0; i < 8; i++) h->state[i] += v[i];
}
static void sha_start(sha *h) { h->bytes = 0; for (int i = 0; i < 8; i++) h->state[i] = root(i, 0.5); }
static void sha_add(sha *h, const void *data, size_t bytes) {
    for (const uint8_t *p = data; bytes--; p++) { h->block[h->bytes++ % 64] = *p; if (h->bytes % 64 == 0) sha_block(h); }
}
static const char *sha_end(sha *h) {
    static char text[65];
    uint64_t length = 8 * h->bytes; uint8_t byte = 0x80;
    do { sha_add(h, &byte, 1); byte = 0; } while (h->bytes % 64 != 56);
    for (int i = 56; i >= 0; i -= 8) { byte = (uint8_t)(length >> i); sha_add(h, &byte, 1); }
    for (int i = 0; i < 8; i++) sprintf(text + 8 * i, "%08x", h->state[i]);
    return text;
}
static const char *sha_of(const void *data, size_t bytes) { sha h; sha_start(&h); sha_add(&h, data, bytes); return sha_end(&h); }

/* the file */
static uint8_t *file; static size_t file_bytes, data_at; static node *header, *others;
static void put_float(uint8_t *out, float value) { uint32_t u; memcpy(&u, &value, 4); for (int i = 0; i < 4; i++) out[i] = (uint8_t)(u >> 8 * i); }
static float get_float(const uint8_t *in) { uint32_t u = in[0] | in[1] << 8 | in[2] << 16 | (uint32_t)in[3] << 24; float v; memcpy(&v, &u, 4); return v; }

static const uint8_t *bytes_of(const char *name, size_t *bytes) { /* section 1: a tensor of the safetensors file */
    node *entry = find(header, name), *offsets = entry ? need(entry, "data_offsets", '[')->child : NULL;
    if (!entry || strcmp(need(entry, "dtype", '"')->text, "U8") || !offsets || !offsets->next) fail("a csq tensor is missing");
    size_t start = count_of(offsets), stop = count_of(offsets->next);
    if (start > stop || stop > file_bytes - data_at) fail("a tensor that ends beyond the file");
    *bytes = stop - start;
    return file + data_at + start;
}

static struct { const char *name; size_t width; } types[] = {{"float64", 8}, {"float32", 4}, {"float16", 2}, {"bfloat16", 2},
    {"int64", 8}, {"int32", 4}, {"int16", 2}, {"int8", 1}, {"uint8", 1}, {"bool", 1}};
static size_t index_of(const char *type) {
    for (size_t i = 0; i < sizeof types / sizeof *types; i++) if (!strcmp(types[i].name, type)) return i;
    fail("an unknown type");
    return 0;
}
static size_t width_of(const char *type) { return types[index_of(type)].width; }

static void fits(size_t size, size_t bytes) { /* DEFLATE gives at most 1032 bytes for one */
    if (size / 1040 > bytes) fail("a shape that its bytes cannot fill");
}

/* section 5: values of tensor `name` of packed_others in its model's type, little-endian; NULL where there is none */
static uint8_t *unpacked(const char *name, node **found) {
    static uint8_t *inflated[sizeof types / sizeof *types]; /* the bytes of each type, once they were needed */
    node *wanted = others ? others->child : NULL;
    while (wanted && strcmp(need(wanted, "name", '"')->text, name)) wanted = wanted->next;
    if (!wanted) return NULL;
    *found = wanted;
    node *stored = find(wanted, "stored");
    const char *type = need(wanted, "dtype", '"')->text, *kept = stored && stored->type == '"' ? stored->text : type;
    size_t width = width_of(kept), total = 0, start = 0, n = elements(need(wanted, "shape", '[')), bytes;
    for (node *other = others->child; other; other = other->next) {
        node *s = find(other, "stored");
        if (strcmp(s && s->type == '"' ? s->text : need(other, "dtype", '"')->text, kept)) continue;
        if (other == wanted) start = total;
        total += elements(need(other, "shape", '['));
    }
    char group[32] = "csq_";
    const uint8_t *packed = bytes_of(strcat(group, kept), &bytes);
    fits(total * width, bytes);
    uint8_t *raw = inflated[index_of(kept)], *values = get(n * width);
    if (!raw) inflate(packed, bytes, raw = inflated[index_of(kept)] = get(total * width), total * width, 1);
    for (size_t i = 0; i < n; i++) for (size_t b = 0; b < width; b++) values[i * width + b] = raw[b * total + start + i];
    if (kept == type) return values;
    if (strcmp(kept, "float16") || strcmp(type, "float32")) fail("stored in a type that is not float16");
    node *exponent = find(wanted, "exponent");
    if (exponent && fabs(exponent->number) > 256) fail("an exponent beyond 256");
    uint8_t *floats = get(4 * n);
    for (size_t i = 0; i < n; i++) {
        unsigned half = values[2 * i] | (unsigned)values[2 * i + 1] << 8, e = half >> 10 & 31, m = half & 1023;
        if (e == 31) fail("a float16 number that is not finite");
        double value = ldexp(e ? 1024 + m : m, (int)(e ? e : 1) - 25 - (exponent ? (int)exponent->number : 0));
        put_float(floats + 4 * i, (float)(half >> 15 ? -value : value));
    }
    free(values);
    return floats;
}

static void print_tensor(const char *name, const char *type, node *shape, const uint8_t *values) {
    size_t n = elements(shape);
    printf("tensor %s %s [", sha_of(values, n * width_of(type)), type);
    for (node *side = shape->child; side; side = side->next) printf("%zu%s", count_of(side), side->next ? "," : "");
    printf("] %s\n", name);
}

static const char **taken; static size_t takes; /* tensors that belong to layers */
static uint8_t *of_layer(const char *layer, const char *part, node **record) {
    char *name = get(strlen(layer) + strlen(part) + 1);
    uint8_t *values = unpacked(strcat(strcpy(name, layer), part), record);
    if (!values) fail("a layer's tensor is missing");
    if (strcmp(need(*record, "dtype", '"')->text, "float32")) fail("a layer's tensor is not float32");
    taken[takes++] = name;
    return values;
}

static void read_layer(node *layer, const uint8_t *payload, size_t bytes, sha *all) {
    const char *name = need(layer, "name", '"')->text, *encoding = need(layer, "encoding", '"')->text;
    node *shape = need(layer, "shape", '['), *dim = find(layer, "channel_dim"), *basis = find(layer, "basis"), *record;
    size_t n = elements(shape), width = (size_t)atoi(strncmp(encoding, "codes", 5) ? "0" : encoding + 5), rank = 0, inner = 1, step = 1;
    if (width != 2 && width != 4 && width != 8 && width != 16) fail("an unknown encoding");
    char names[2][24];
    sprintf(names[0], "codes%zu", width); sprintf(names[1], "codes%zu+huffman", width);
    int coded = !strcmp(encoding, names[1]);
    if (!coded && strcmp(encoding, names[0])) fail("an unknown encoding");
    size_t size = (n * width + 7) / 8; /* section 3 */
    fits(size, bytes);
    uint8_t *codes = get(size), *integers = get(2 * n), *weight = get(4 * n);
    if (coded) inflate(payload, bytes, codes, size, 1);
    else if (bytes != size) fail("codes that do not fill their shape");
    else memcpy(codes, payload, size);
    for (node *side = shape->child; side; side = side->next) rank++;
    long channel = dim && fabs(dim->number) < 9 ? (long)dim->number : 0;
    if (channel < 0) channel += (long)rank;
    if (channel < 0 || (size_t)channel >= rank) fail("no such channel dimension");
    size_t place = 0, channels = 0;
    for (node *side = shape->child; side; side = side->next, place++) {
        if (place == (size_t)channel) channels = count_of(side);
        if (place > (size_t)channel) inner *= count_of(side);
    }
    const uint8_t *scale = NULL; float one = 0; int planes = 0; size_t columns = 1;
    if (basis && basis->type == '[') { /* section 6 */
        scale = of_layer(name, "_basis", &record);
        node *sides = need(record, "shape", '[')->child;
        if (!sides || !sides->next || sides->next->next) fail("a basis that is no matrix");
        columns = count_of(sides->next);
        if (count_of(sides) < 1 || count_of(sides) > 8) fail("a basis of too many planes");
        planes = (int)count_of(sides);
    } else if (find(layer, "scale") && find(layer, "scale")->type == '[') {
        scale = of_layer(name, "_scale", &record);
        columns = elements(need(record, "shape", '['));
    } else one = (float)need(layer, "scale", '0')->number;
    if (columns != 1 && columns != channels) fail("as many scales as there are neither layers nor channels");
    if (columns == 1) step = 0;
    for (size_t i = 0; i < n; i++) {
        int code = width == 16 ? codes[i] | codes[n + i] << 8 : codes[i * width / 8] >> (i * width % 8) & ((1 << width) - 1);
        int q = code - ((1 << (width - 1)) - 1);
        size_t column = i / inner % channels * step;
        float value = (float)q * (scale && !planes ? get_float(scale + 4 * column) : one);
        if (planes && (q % 2 == 0 || abs(q) >= 1 << planes)) fail("an integer that is no sum of digits");
        for (int j = 0; j < planes; j++) {
            float v = get_float(scale + 4 * ((size_t)j * columns + column));
            if (!((q + (1 << planes) - 1) / 2 >> j & 1)) v = -v;
            value = j ? value + v : v;
        }
        integers[2 * i] = (uint8_t)q; integers[2 * i + 1] = (uint8_t)(q >> 8);
        put_float(weight + 4 * i, value);
    }
    sha_add(all, name, strlen(name) + 1);
    sha_add(all, integers, 2 * n);
    printf("integers %s %s\n", sha_of(integers, 2 * n), name);
    print_tensor(name, "float32", shape, weight);
    node *aliases = find(layer, "aliases");
    for (node *alias = aliases ? aliases->child : NULL; alias; alias = alias->next) {
        if (alias->type != '"') fail("an alias that is no name");
        print_tensor(alias->text, "float32", shape, weight);
    }
    free(codes); free(integers); free(weight);
}

int main(int arguments, char **argument) {
    FILE *stream = arguments == 2 ? fopen(argument[1], "rb") : NULL;
    if (!stream) fail("give the name of one file that can be read");
    for (size_t room = 0, got = 1; got; file_bytes += got) {
        if (room < file_bytes + 65536 && !(file = realloc(file, room = 2 * file_bytes + 131072))) fail("not enough memory");
        got = fread(file + file_bytes, 1, 65536, stream);
    }
    uint64_t length = 0;
    for (int i = 7; i >= 0 && file_bytes > 8; i--) length = length << 8 | file[i];
    if (!length || length > file_bytes - 8) fail("not a safetensors file");
    data_at = 8 + (size_t)length;
    char *text = get((size_t)length + 1);
    header = json(memcpy(text, file + 8, (size_t)length), (size_t)length);
    node *said = find(find(header, "__metadata__"), "csq"), *codes = find(header, "csq_codes");
    if (!said || said->type != '"' || !codes) fail("not a bit-packed file of csq");
    double version = need(json(said->text, strlen(said->text)), "schema_version", '0')->number; /* section 2 */
    if (version != 1 && version != 2) fail("a schema version that this reader does not know");
    size_t bytes, limit = 1 << 23;
    const uint8_t *packed = bytes_of("csq_manifest", &bytes);
    text = get(limit + 1);
    node *manifest = json(text, inflate(packed, bytes, (uint8_t *)text, limit, 0)), *layers = need(manifest, "layers", '[');
    others = find(manifest, "packed_others");
    size_t many = 0;
    for (node *layer = layers->child; layer; layer = layer->next) many++;
    taken = get(2 * many * sizeof *taken);
    const uint8_t *payloads = bytes_of("csq_codes", &bytes);
    sha all;
    sha_start(&all);
    for (node *layer = layers->child; layer; layer = layer->next) {
        size_t own = count_of(need(layer, "packed_bytes", '0'));
        if (own > bytes) fail("payloads beyond the codes");
        read_layer(layer, payloads, own, &all);
        payloads += own; bytes -= own;
    }
    if (bytes) fail("codes that belong to no layer");
    if (strcmp(sha_end(&all), need(manifest, "payload_sha256", '"')->text)) fail("integers do not match their SHA-256");
    for (node *other = others ? others->child : NULL, *record; other; other = other->next) {
        const char *name = need(other, "name", '"')->text;
        size_t i = 0;
        while (i < takes && strcmp(taken[i], name)) i++;
        if (i < takes) continue;
        uint8_t *values = unpacked(name, &record);
        print_tensor(name, need(record, "dtype", '"')->text, need(record, "shape", '['), values);
        free(values);
    }
    return 0;
}
