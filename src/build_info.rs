//! Version and commit of this program, as `--version`, `vestibule_build_info` and the process log show them.

/// The version of the package.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The first 12 digits of the git commit that the program was built from, or `unknown`; `build.rs` finds it.
pub const COMMIT: &str = env!("VESTIBULE_COMMIT");

/// Version and commit in one text: `0.1.0 (commit 0123456789ab)`.
pub const VERSION_AND_COMMIT: &str =
    concat!(env!("CARGO_PKG_VERSION"), " (commit ", env!("VESTIBULE_COMMIT"), ")");
