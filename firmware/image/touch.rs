//! The code at [`firmware::abi::TOUCH`].

use core::arch::global_asm;

use firmware::abi::{DOORBELL, Doorbell, PAGE_SIZE};

global_asm!(
    r#"
    .pushsection .text.touch, "ax"
    .globl touch
touch:
    lock or byte ptr [rdi], 0
    add rdi, {page_size}
    dec rcx
    jnz touch
    mov eax, {touched}
    mov edx, {doorbell}
    out dx, eax
    ud2
    .popsection
    "#,
    page_size = const PAGE_SIZE,
    touched = const Doorbell::Touched as u32,
    doorbell = const DOORBELL,
);
