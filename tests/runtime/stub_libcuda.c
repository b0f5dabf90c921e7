/* A libcuda.so.1 on malloc and memcpy, for tests of the call path without a GPU.

   Everything is done at once, in the thread that asks. A stream that is being captured keeps copies
   and host functions, and launching the graph does them. Calls without a current context fail, as
   the driver's do. What the tests ask of it beyond CUDA begins with stub_. */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef int R;
typedef uint64_t Ptr;
typedef void (*HostFn)(void *);
typedef struct Node { void *to; const void *from; size_t size; int value; HostFn fn; void *data; struct Node *next; } Node;
typedef struct { Node *first, **last; } Graph;
typedef struct { Graph *capture; } Stream;
typedef struct Pinned { char *at; size_t size; struct Pinned *next; } Pinned;

enum { OK, INVALID_VALUE, OUT_OF_MEMORY, INVALID_CONTEXT = 201, NOT_FOUND = 500 };
static char fail_name[64];
static int wait_us, waits, live, calls, pinned_queries;
static _Thread_local void *contexts[64];
static _Thread_local int depth;
static int primary;
static Pinned *pinned;

void stub_fail(const char *name) { snprintf(fail_name, sizeof fail_name, "%s", name); }
void stub_wait_us(int us) { wait_us = us; }
int stub_waits(void) { return waits; }
int stub_live(void) { return live; }
int stub_calls(void) { return calls; }
int stub_depth(void) { return depth; }

static R enter(const char *name) {
  calls++;
  if (*fail_name && !strcmp(name, fail_name)) { *fail_name = 0; return OUT_OF_MEMORY; }
  return OK;
}
static R begin(const char *name) { R r = enter(name); return r ? r : depth ? OK : INVALID_CONTEXT; }
#define ENTER do { R r_ = enter(__func__); if (r_) return r_; } while (0)
#define BEGIN do { R r_ = begin(__func__); if (r_) return r_; } while (0)

static void work(const Node *n) {
  if (n->fn) n->fn(n->data);
  else if (n->from) memcpy(n->to, n->from, n->size);
  else memset(n->to, n->value, n->size);
}
static R put(Stream *s, Node n) {
  if (!s->capture) { work(&n); return OK; }
  *s->capture->last = malloc(sizeof n);
  **s->capture->last = n;
  s->capture->last = &(*s->capture->last)->next;
  return OK;
}

R cuInit(unsigned f) { ENTER; return OK; }
R cuDriverGetVersion(int *v) { *v = 13000; return OK; }
R cuDeviceGetCount(int *n) { *n = 1; return OK; }
R cuDeviceGet(int *d, int i) { ENTER; *d = i; return OK; }
R cuDeviceGetName(char *b, int n, int d) { snprintf(b, n, "Stub GPU"); return OK; }
R cuDeviceGetAttribute(int *v, int a, int d) { *v = a == 75 ? 8 : a == 76 ? 9 : 1; return OK; }
R cuDeviceTotalMem_v2(size_t *n, int d) { *n = (size_t)8 << 30; return OK; }
R cuDevicePrimaryCtxRetain(void **c, int d) { ENTER; *c = &primary; return OK; }
R cuCtxPushCurrent_v2(void *c) { ENTER; contexts[depth++] = c; return OK; }
R cuCtxPopCurrent_v2(void **c) { BEGIN; *c = contexts[--depth]; return OK; }
R cuMemGetInfo_v2(size_t *f, size_t *t) { BEGIN; *f = (size_t)4 << 30; *t = (size_t)8 << 30; return OK; }
R cuMemAlloc_v2(Ptr *p, size_t n) { BEGIN; live++; *p = (Ptr)aligned_alloc(256, (n + 255) & ~(size_t)255); return *p ? OK : OUT_OF_MEMORY; }
R cuMemFree_v2(Ptr p) { BEGIN; live--; free((void *)p); return OK; }
R cuMemAllocHost_v2(void **p, size_t n) {
  BEGIN;
  live++;
  Pinned *entry = malloc(sizeof *entry);
  *p = aligned_alloc(4096, (n + 4095) & ~(size_t)4095);
  *entry = (Pinned){*p, n, pinned};
  pinned = entry;
  return OK;
}
R cuMemFreeHost(void *p) {
  BEGIN;
  for (Pinned **entry = &pinned; *entry; entry = &(*entry)->next)
    if ((*entry)->at == p) { Pinned *old = *entry; *entry = old->next; free(old); live--; free(p); return OK; }
  return INVALID_VALUE;
}
R cuPointerGetAttribute(void *data, int attribute, Ptr p) {
  BEGIN;
  pinned_queries++;
  for (Pinned *entry = pinned; entry; entry = entry->next)
    if ((char *)p >= entry->at && (char *)p < entry->at + entry->size) { *(unsigned *)data = 1; return OK; }
  return INVALID_VALUE;
}
R cuMemcpyHtoDAsync_v2(Ptr to, const void *from, size_t n, Stream *s) { BEGIN; return put(s, (Node){(void *)to, from, n}); }
R cuMemcpyDtoHAsync_v2(void *to, Ptr from, size_t n, Stream *s) { BEGIN; return put(s, (Node){to, (void *)from, n}); }
R cuMemcpyDtoDAsync_v2(Ptr to, Ptr from, size_t n, Stream *s) { BEGIN; return put(s, (Node){(void *)to, (void *)from, n}); }
R cuMemsetD8Async(Ptr to, unsigned char v, size_t n, Stream *s) { BEGIN; return put(s, (Node){(void *)to, NULL, n, v}); }
R cuLaunchHostFunc(Stream *s, HostFn fn, void *data) { BEGIN; return put(s, (Node){.fn = fn, .data = data}); }
R cuStreamCreate(Stream **s, unsigned f) { BEGIN; live++; *s = calloc(1, sizeof **s); return OK; }
R cuStreamDestroy_v2(Stream *s) { BEGIN; live--; free(s); return OK; }
R cuStreamWaitEvent(Stream *s, void *e, unsigned f) { BEGIN; return OK; }
/* One device: what two threads wait for takes its time one after the other. */
static pthread_mutex_t device = PTHREAD_MUTEX_INITIALIZER;
static R pause_(void) {
  waits++;
  if (wait_us) { pthread_mutex_lock(&device); usleep(wait_us); pthread_mutex_unlock(&device); }
  return OK;
}
R cuStreamSynchronize(Stream *s) { BEGIN; return pause_(); }
R cuEventCreate(void **e, unsigned f) { BEGIN; live++; *e = malloc(8); return OK; }
R cuEventDestroy_v2(void *e) { BEGIN; live--; free(e); return OK; }
R cuEventRecord(void *e, Stream *s) { BEGIN; return OK; }
R cuEventSynchronize(void *e) { BEGIN; return pause_(); }
R cuEventElapsedTime_v2(float *ms, void *a, void *b) { BEGIN; *ms = 0.5f; return OK; }
R cuStreamBeginCapture_v2(Stream *s, int mode) { BEGIN; s->capture = calloc(1, sizeof(Graph)); s->capture->last = &s->capture->first; return OK; }
R cuStreamEndCapture(Stream *s, Graph **g) { BEGIN; *g = s->capture; s->capture = NULL; return OK; }
R cuGraphInstantiateWithFlags(Graph **x, Graph *g, unsigned long long f) { BEGIN; live++; *x = malloc(sizeof **x); **x = *g; return OK; }
R cuGraphDestroy(Graph *g) { BEGIN; free(g); return OK; }
R cuGraphLaunch(Graph *x, Stream *s) { BEGIN; for (Node *n = x->first; n; n = n->next) put(s, *n); return OK; }
R cuGraphExecDestroy(Graph *x) { BEGIN; live--; for (Node *n = x->first; n;) { Node *old = n; n = n->next; free(old); } free(x); return OK; }
R cuGetErrorName(int e, const char **s) { *s = "CUDA_ERROR"; return OK; }
R cuGetErrorString(int e, const char **s) { *s = "stub"; return OK; }

R cuGetProcAddress_v2(const char *name, void **f, int version, uint64_t flags, int *status);
#define F(name) {#name, (void *)name}
static const struct { const char *name; void *function; } table[] = {
  F(cuInit), F(cuDriverGetVersion), F(cuDeviceGetCount), F(cuDeviceGet), F(cuDeviceGetName), F(cuDeviceGetAttribute),
  F(cuDeviceTotalMem_v2), F(cuDevicePrimaryCtxRetain), F(cuCtxPushCurrent_v2), F(cuCtxPopCurrent_v2), F(cuMemGetInfo_v2),
  F(cuMemAlloc_v2), F(cuMemFree_v2), F(cuMemAllocHost_v2), F(cuMemFreeHost), F(cuPointerGetAttribute),
  F(cuMemcpyHtoDAsync_v2), F(cuMemcpyDtoHAsync_v2), F(cuMemcpyDtoDAsync_v2), F(cuMemsetD8Async), F(cuLaunchHostFunc),
  F(cuStreamCreate), F(cuStreamDestroy_v2), F(cuStreamWaitEvent), F(cuStreamSynchronize), F(cuEventCreate),
  F(cuEventDestroy_v2), F(cuEventRecord), F(cuEventSynchronize), F(cuEventElapsedTime_v2), F(cuStreamBeginCapture_v2),
  F(cuStreamEndCapture), F(cuGraphInstantiateWithFlags), F(cuGraphDestroy), F(cuGraphLaunch), F(cuGraphExecDestroy),
  F(cuGetErrorName), F(cuGetErrorString), F(cuGetProcAddress_v2),
};
R cuGetProcAddress_v2(const char *name, void **f, int version, uint64_t flags, int *status) {
  size_t length = strlen(name);
  for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
    const char *rest = table[i].name + length;
    if (!strncmp(table[i].name, name, length) && (!*rest || !strcmp(rest, "_v2"))) {
      *f = table[i].function;
      if (status) *status = 0;
      return OK;
    }
  }
  *f = NULL;
  if (status) *status = 1;
  return NOT_FOUND;
}
