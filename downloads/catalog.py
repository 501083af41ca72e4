"""The published files that the pack can fetch, and the sets of them that belong together.

Sizes are of the files as published. A `sha256` stands where two public records that know nothing of each other state
the same one, and a commit where a record states it for that very file. Everything else is asked of the hub when a
download begins: which commit its `main` is then, and what sha256 the file has there.
"""

from dataclasses import dataclass

MAIN = "main"

WAN = "Comfy-Org/Wan_2.1_ComfyUI_repackaged"
QWEN = "Comfy-Org/Qwen-Image_ComfyUI"
QWEN_EDIT = "Comfy-Org/Qwen-Image-Edit_ComfyUI"
KIJAI = "Kijai/WanVideo_comfy"
LIGHTNING = "lightx2v/Qwen-Image-Lightning"

WAN_COMMIT = "123acf1cc74bccbb9bfff8ac1ee72edc08c2341d"
OTHER_WAN_COMMIT = "617a7633e636506f850e043bc4605f290a466a8e"
QWEN_COMMIT = "1f12b17be14c89b026c51a91d67c32f84bb047bc"


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedFile:
    """A file of a repository and the folder of ComfyUI's that it belongs into; `size` in bytes."""

    repo: str
    path: str
    folder: str
    size: int
    sha256: str | None = None
    revision: str = MAIN

    @property
    def name(self) -> str:
        """Return the file's name without folders."""
        return self.path.rpartition("/")[2]


@dataclass(frozen=True, kw_only=True, slots=True)
class FileSet:
    """Files that belong together: `name` is for a terminal, `title` for people."""

    name: str
    title: str
    files: tuple[PublishedFile, ...]

    @property
    def size(self) -> int:
        """Return the bytes of all files."""
        return sum(file.size for file in self.files)


def _split(repo: str, folder: str, name: str, size: int, sha256: str | None = None, at: str = MAIN) -> PublishedFile:
    """Return a file of one of Comfy-Org's repositories, which have ComfyUI's folders under split_files/."""
    path = f"split_files/{folder}/{name}.safetensors"
    return PublishedFile(repo=repo, path=path, folder=folder, size=size, sha256=sha256, revision=at)


def _lora(repo: str, name: str, size: int, sha256: str | None = None, at: str = MAIN) -> PublishedFile:
    path = f"{name}.safetensors"
    return PublishedFile(repo=repo, path=path, folder="loras", size=size, sha256=sha256, revision=at)


UMT5 = _split(
    WAN, "text_encoders", "umt5_xxl_fp8_e4m3fn_scaled", 6735906897,
    "c3355d30191f1f066b26d93fba017ae9809dce6c627dda5f6a66eaa651204f68", WAN_COMMIT,
)  # fmt: skip
UMT5_FP16 = _split(
    WAN, "text_encoders", "umt5_xxl_fp16", 11366399385,
    "7b8850f1961e1cf8a77cca4c964a358d303f490833c6c087d0cff4b2f99db2af", WAN_COMMIT,
)  # fmt: skip
WAN_VAE = _split(
    WAN, "vae", "wan_2.1_vae", 253815318,
    "2fc39d31359a4b0a64f55876d8ff7fa8d780956ae2cb13463b0223e15148976b", WAN_COMMIT,
)  # fmt: skip
CLIP = _split(
    WAN, "clip_vision", "clip_vision_h", 1264219396,
    "64a7ef761bfccbadbaa3da77366aac4185a6c58fa5de5f589b42a65bcc21f161", WAN_COMMIT,
)  # fmt: skip
T2V_SMALL = _split(
    WAN, "diffusion_models", "wan2.1_t2v_1.3B_fp16", 2838303560,
    "be531024cd9018cb5b48c40cfbb6a6191645b1c792eb8bf4f8c1c6e10f924dc5", WAN_COMMIT,
)  # fmt: skip
T2V = _split(
    WAN, "diffusion_models", "wan2.1_t2v_14B_fp8_scaled", 14293896178,
    "2e39adde59c5e0e90edbb35873126b0d67928b5c11c501e384e976d6dc597cce",
)  # fmt: skip
I2V_480P = _split(
    WAN, "diffusion_models", "wan2.1_i2v_480p_14B_fp8_scaled", 16401356938,
    "b2de21b99b2e72cb0ff15253b07e926f26e7cf1b7e229efc32f94ad1f1ed9395", OTHER_WAN_COMMIT,
)  # fmt: skip
I2V_480P_FP16 = _split(
    WAN, "diffusion_models", "wan2.1_i2v_480p_14B_fp16", 32791377504,
    "27988f6b510eb8d5fdd7485671b54897f8683f2bba7a772c5671be21d3491253", "06e001fc51048fb03433a6fb25334de7836704a5",
)  # fmt: skip
I2V_720P = _split(WAN, "diffusion_models", "wan2.1_i2v_720p_14B_bf16", 32789894024)
FLF2V = _split(WAN, "diffusion_models", "wan2.1_flf2v_720p_14B_fp16", 32792693440)
VACE_SMALL = _split(
    WAN, "diffusion_models", "wan2.1_vace_1.3B_fp16", 4309519800,
    "640ccc0577e6a5d4bb15cd91b11b699ef914fc55f126c5a1c544e152130784f2", OTHER_WAN_COMMIT,
)  # fmt: skip
VACE = _split(
    WAN, "diffusion_models", "wan2.1_vace_14B_fp16", 34675323640,
    "f202a5c59b8a91ada1862c46a038214f1f7f216c61ec8350d25f69b919da4307", WAN_COMMIT,
)  # fmt: skip
T2V_LIGHTX2V = _lora(
    KIJAI, "Lightx2v/lightx2v_T2V_14B_cfg_step_distill_v2_lora_rank64_bf16", 630697104,
    "37d49218544b9e0bfb8e831d1399f451fbc5068aff6474f42a90c928363c3573", "87badb1f794c15daf51db60838a433ca08bb218f",
)  # fmt: skip
I2V_LIGHTX2V = _lora(
    KIJAI, "Lightx2v/lightx2v_I2V_14B_480p_cfg_step_distill_rank64_bf16", 738005744,
    "85c4a61c30e0497aa44b91d93a893b624708461a56fe5485183b28fa07e2dfb3", "8260d429d19fd7a72304cad059160b95d843913f",
)  # fmt: skip
CAUSVID_SMALL = _lora(KIJAI, "Wan21_CausVid_bidirect2_T2V_1_3B_lora_rank32", 91233416)

QWEN_VL = _split(
    QWEN, "text_encoders", "qwen_2.5_vl_7b_fp8_scaled", 9384670680,
    "cb5636d852a0ea6a9075ab1bef496c0db7aef13c02350571e388aea959c5c0b4", QWEN_COMMIT,
)  # fmt: skip
QWEN_VAE = _split(
    QWEN, "vae", "qwen_image_vae", 253806246,
    "a70580f0213e67967ee9c95f05bb400e8fb08307e017a924bf3441223e023d1f", QWEN_COMMIT,
)  # fmt: skip
QWEN_IMAGE = _split(
    QWEN, "diffusion_models", "qwen_image_fp8_e4m3fn", 20430635136,
    "98763a127701eb6fb59096f7742cb3aa7d64ed510b9f4e882d8351f8176e3ce3", QWEN_COMMIT,
)  # fmt: skip
QWEN_IMAGE_BF16 = _split(QWEN, "diffusion_models", "qwen_image_bf16", 40861031488)
QWEN_IMAGE_2512 = _split(
    QWEN, "diffusion_models", "qwen_image_2512_fp8_e4m3fn", 20430679144,
    "5dc80554d5d83390046a2f4a94ece06afb7700bf7b0aaf8bde9769793875876b", "c232bcb51c1523899c62d6dcaa960b2627668de5",
)  # fmt: skip
EDIT = _split(
    QWEN_EDIT, "diffusion_models", "qwen_image_edit_fp8_e4m3fn", 20430635136,
    "393c6743d1de2e9031b5197027b36116f2096958ccc0223526d34e1860266021", "7d41107b653d3039be20972fb82398b01b3213eb",
)  # fmt: skip
EDIT_2509 = _split(
    QWEN_EDIT, "diffusion_models", "qwen_image_edit_2509_fp8_e4m3fn", 20430698424,
    "318568f61951ab9da21100c7b896e3c1da67f0d2efad6421545e022cfaa2b2b4",
)  # fmt: skip
EDIT_2511 = _split(
    QWEN_EDIT, "diffusion_models", "qwen_image_edit_2511_fp8mixed", 20533762817,
    "c9fdc158e46d3b61ef75f21ae866ca2fe808bf4a53643120d1c1e87c19280a4e", "e9e85de74a8f48c1e3e2656617626348675a2f21",
)  # fmt: skip
QWEN_LIGHTNING = _lora(LIGHTNING, "Qwen-Image-Lightning-8steps-V1.0", 1698951104)
LIGHTNING_2512 = _lora(
    "lightx2v/Qwen-Image-2512-Lightning", "Qwen-Image-2512-Lightning-4steps-V1.0-bf16", 849608296,
    "de0d236e54ecf2c43b32447d13478c6eae0d361b1fed48c69675b084fa240d87", "a52649c9d0f6e1a248bff13f0df33bb8a2abdb52",
)  # fmt: skip
EDIT_LIGHTNING = _lora(
    LIGHTNING, "Qwen-Image-Edit-Lightning-4steps-V1.0-bf16", 849608296, at="e74da8d4e71a54b341de86aa9f8d2509165aa513"
)
LIGHTNING_2509 = _lora(
    LIGHTNING, "Qwen-Image-Edit-2509/Qwen-Image-Edit-2509-Lightning-4steps-V1.0-bf16", 849608296,
    "2a32ce938ec71db2b49a817b4844ae86995569518dea56ee0ddc209cbe8e1377",
)  # fmt: skip
LIGHTNING_2511 = _lora(
    "lightx2v/Qwen-Image-Edit-2511-Lightning", "Qwen-Image-Edit-2511-Lightning-4steps-V1.0-bf16", 849608296,
    "22226e8d05d354bb356627d428809f5afd7819399b077238a2b70a82883a904f", "fd3a43ffb5bc98c7d09b2238e5b09a63284a16f8",
)  # fmt: skip

SETS = tuple(
    FileSet(name=name, title=title, files=files)
    for name, title, files in (
        ("wan21-t2v-1.3b", "Wan 2.1 T2V 1.3B", (T2V_SMALL, UMT5, WAN_VAE)),
        ("wan21-t2v", "Wan 2.1 T2V 14B (fp8 scaled)", (T2V, UMT5, WAN_VAE)),
        ("wan21-i2v-480p", "Wan 2.1 I2V 14B 480P (fp8 scaled)", (I2V_480P, UMT5, WAN_VAE, CLIP)),
        ("wan21-i2v-480p-fp16", "Wan 2.1 I2V 14B 480P (fp16)", (I2V_480P_FP16, UMT5, WAN_VAE, CLIP)),
        ("wan21-i2v-720p-bf16", "Wan 2.1 I2V 14B 720P (bf16)", (I2V_720P, UMT5, WAN_VAE, CLIP)),
        ("wan21-flf2v-fp16", "Wan 2.1 FLF2V 14B 720P (fp16)", (FLF2V, UMT5, WAN_VAE, CLIP)),
        ("wan21-vace-1.3b", "Wan 2.1 VACE 1.3B", (VACE_SMALL, UMT5, WAN_VAE)),
        ("wan21-vace-fp16", "Wan 2.1 VACE 14B (fp16)", (VACE, UMT5, WAN_VAE)),
        ("wan21-t2v-lightx2v", "Wan 2.1 T2V LightX2V LoRA", (T2V_LIGHTX2V,)),
        ("wan21-i2v-lightx2v", "Wan 2.1 I2V LightX2V LoRA", (I2V_LIGHTX2V,)),
        ("wan21-causvid-1.3b", "Wan 2.1 CausVid LoRA, 1.3B", (CAUSVID_SMALL,)),
        ("wan21-umt5-fp16", "Wan 2.1 text encoder (fp16)", (UMT5_FP16,)),
        ("qwen-image", "Qwen-Image (fp8)", (QWEN_IMAGE, QWEN_VL, QWEN_VAE)),
        ("qwen-image-bf16", "Qwen-Image (bf16)", (QWEN_IMAGE_BF16, QWEN_VL, QWEN_VAE)),
        ("qwen-image-2512", "Qwen-Image-2512 (fp8)", (QWEN_IMAGE_2512, QWEN_VL, QWEN_VAE)),
        ("qwen-image-edit", "Qwen-Image-Edit (fp8)", (EDIT, QWEN_VL, QWEN_VAE)),
        ("qwen-image-edit-2509", "Qwen-Image-Edit-2509 (fp8)", (EDIT_2509, QWEN_VL, QWEN_VAE)),
        ("qwen-image-edit-2511", "Qwen-Image-Edit-2511 (fp8)", (EDIT_2511, QWEN_VL, QWEN_VAE)),
        ("qwen-image-lightning", "Qwen-Image Lightning LoRA, 8 steps", (QWEN_LIGHTNING,)),
        ("qwen-image-2512-lightning", "Qwen-Image-2512 Lightning LoRA, 4 steps", (LIGHTNING_2512,)),
        ("qwen-image-edit-lightning", "Qwen-Image-Edit Lightning LoRA, 4 steps", (EDIT_LIGHTNING,)),
        ("qwen-image-edit-2509-lightning", "Qwen-Image-Edit-2509 Lightning LoRA, 4 steps", (LIGHTNING_2509,)),
        ("qwen-image-edit-2511-lightning", "Qwen-Image-Edit-2511 Lightning LoRA, 4 steps", (LIGHTNING_2511,)),
    )
)


def files_of(what: str) -> tuple[PublishedFile, ...]:
    """Return the files of a set, by its name or title, or the one file of that name. Raises ValueError for others."""
    for known in SETS:
        if what in (known.name, known.title):
            return known.files
    if files := {file for known in SETS for file in known.files if file.name == what}:
        return tuple(files)
    raise ValueError(
        f"There is no set and no file called {what}: the sets are {', '.join(known.name for known in SETS)}."
    )


def set_with(file_name: str) -> FileSet | None:
    """Return the first set that has a file of that name, None if no set does."""
    return next((known for known in SETS if any(file.name == file_name for file in known.files)), None)
