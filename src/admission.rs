//! Pure rules of admission: who may come in.

pub mod slots;
