/* As much of cuBLAS as PyTorch asks for, of the card in RAM. Nothing is computed, so that most arguments don't matter. */
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

int card_launches(void);

#define MAKES(name) int name(void **made) { *made = calloc(1, 64); return 0; }
MAKES(cublasCreate_v2) MAKES(cublasLtMatmulDescCreate) MAKES(cublasLtMatrixLayoutCreate)
MAKES(cublasLtMatmulPreferenceCreate)

#define ANSWERS_0(name) int name(void *handle, int *answer) { *answer = 0; return 0; }
ANSWERS_0(cublasGetMathMode) ANSWERS_0(cublasGetPointerMode_v2)

#define AGREES(name) int name(void) { return 0; }
AGREES(cublasDestroy_v2) AGREES(cublasSetStream_v2) AGREES(cublasSetWorkspace_v2) AGREES(cublasSetMathMode)
AGREES(cublasSetPointerMode_v2) AGREES(cublasSetSmCountTarget) AGREES(cublasLtMatmulDescDestroy)
AGREES(cublasLtMatmulDescSetAttribute) AGREES(cublasLtMatrixLayoutDestroy) AGREES(cublasLtMatrixLayoutSetAttribute)
AGREES(cublasLtMatmulPreferenceDestroy) AGREES(cublasLtMatmulPreferenceSetAttribute)

#define LAUNCHES(name) int name(void) { return card_launches() ? 14 : 0; /* an internal error */ }
LAUNCHES(cublasSgemm_v2) LAUNCHES(cublasDgemm_v2) LAUNCHES(cublasSgemmEx) LAUNCHES(cublasGemmEx)
LAUNCHES(cublasSgemv_v2) LAUNCHES(cublasDgemv_v2) LAUNCHES(cublasSgemmStridedBatched)
LAUNCHES(cublasDgemmStridedBatched) LAUNCHES(cublasGemmStridedBatchedEx) LAUNCHES(cublasDotEx)
LAUNCHES(cublasSdot_v2) LAUNCHES(cublasDdot_v2) LAUNCHES(cublasLtMatmul)

struct heuristic { unsigned long long algorithm[8]; size_t workspace; int state; float waves; int reserved[4]; };

int cublasLtMatmulAlgoGetHeuristic(
    void *handle, void *product, void *a, void *b, void *c, void *d, void *wishes, int wanted,
    struct heuristic found[], int *number) {
    memset(found, 0, sizeof *found);
    *number = 1;
    return 0;
}
