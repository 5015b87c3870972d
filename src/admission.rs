//! Pure rules of admission: who may come in, and how many bytes may pass.

pub mod budget;
pub mod pacer;
pub mod pending;
pub mod ports;
pub mod purse;
pub mod quota;
pub mod rate;
pub mod share;
pub mod slots;
