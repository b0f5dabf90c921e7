/* Hides AVX-512, VNNI and AMX from a process, so that its libraries choose their AVX2 kernels.
 *
 * Use hide_vnni.py, which compiles and applies this file. It answers CPUID instructions with those
 * features cleared, in one of two ways:
 *
 * - Linux on x86-64 lets a process trap its own CPUID instructions (arch_prctl, ARCH_SET_CPUID, see
 *   arch_prctl(2)) where the processor can: most of Intel's. They then raise SIGSEGV.
 * - Elsewhere hide_vnni.py replaces the CPUID instructions of ONNX Runtime by UD2, which raises
 *   SIGILL, and sets NO_VNNI_PATCHED.
 *
 * Everything else runs at full speed. /proc/cpuinfo still names the real processor, which is why
 * ONEDNN_MAX_CPU_ISA is set as well: rtresnet and oneDNN read that.
 */
#define _GNU_SOURCE
#include <asm/prctl.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

enum { EAX, EBX, ECX, EDX };

static int trapping; /* whether CPUID raises SIGSEGV; otherwise UD2 in its place raises SIGILL */

static int trap(int on) { return syscall(SYS_arch_prctl, ARCH_SET_CPUID, !on); }

static void answer(unsigned leaf, unsigned subleaf, unsigned out[4]) {
    if (trapping) trap(0);
    __asm__ volatile("cpuid"
                     : "=a"(out[EAX]), "=b"(out[EBX]), "=c"(out[ECX]), "=d"(out[EDX])
                     : "a"(leaf), "c"(subleaf));
    if (trapping) trap(1);
    if (leaf == 7 && subleaf == 0) {
        /* AVX-512 F DQ IFMA PF ER CD BW VL */
        out[EBX] &= ~(1u << 16 | 1u << 17 | 1u << 21 | 1u << 26 | 1u << 27 | 1u << 28 | 1u << 30 |
                      1u << 31);
        /* AVX-512 VBMI VBMI2 VNNI BITALG VPOPCNTDQ */
        out[ECX] &= ~(1u << 1 | 1u << 6 | 1u << 11 | 1u << 12 | 1u << 14);
        /* AVX-512 4VNNIW 4FMAPS VP2INTERSECT FP16, AMX BF16 TILE INT8 */
        out[EDX] &= ~(1u << 2 | 1u << 3 | 1u << 8 | 1u << 22 | 1u << 23 | 1u << 24 | 1u << 25);
    } else if (leaf == 7 && subleaf == 1) {
        /* AVX-VNNI, AVX-512 BF16, AMX FP16, AVX-IFMA; AVX-VNNI-INT8, AVX-NE-CONVERT, INT16, AVX10 */
        out[EAX] &= ~(1u << 4 | 1u << 5 | 1u << 21 | 1u << 23);
        out[EDX] &= ~(1u << 4 | 1u << 5 | 1u << 10 | 1u << 19);
    } else if (leaf == 0xd && subleaf == 0) {
        out[EAX] &= 7; /* states that XCR0 may hold: x87, SSE, AVX */
    } else if (leaf == 0x1d || leaf == 0x1e || leaf == 0x24) {
        memset(out, 0, 4 * sizeof *out); /* AMX tiles and TMUL, AVX10 */
    }
}

static void on_fault(int signal_number, siginfo_t *info, void *context) {
    (void)info;
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    const unsigned char *instruction = (const unsigned char *)registers[REG_RIP];
    if (instruction[0] != 0x0f || instruction[1] != (trapping ? 0xa2 : 0x0b)) { /* a real fault */
        signal(signal_number, SIG_DFL);
        return;
    }
    unsigned out[4];
    answer(registers[REG_RAX], registers[REG_RCX], out);
    registers[REG_RAX] = out[EAX];
    registers[REG_RBX] = out[EBX];
    registers[REG_RCX] = out[ECX];
    registers[REG_RDX] = out[EDX];
    registers[REG_RIP] += 2;
}

__attribute__((constructor)) static void begin(void) {
    struct sigaction action = {0};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
    trapping = getenv("NO_VNNI_PATCHED") == NULL;
    if (sigaction(trapping ? SIGSEGV : SIGILL, &action, NULL) != 0 || (trapping && trap(1) != 0)) {
        fprintf(stderr, "no_vnni: CPUID cannot be trapped here: %s\n", strerror(errno));
        exit(77); /* what automake calls a skip */
    }
}
