//! The binary: everything is in the library.

use std::process::ExitCode;

use mimalloc::MiMalloc;

/// Three of a session's pieces are aligned to cache lines, which glibc's malloc serves by its slow way. Without huge
/// pages: an idle session would be charged for memory that is never used.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

fn main() -> ExitCode {
    vestibule::cli::main()
}
