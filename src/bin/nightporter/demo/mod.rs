//! stub
pub(crate) fn run(_: &crate::args::Demo) -> Result<String, crate::exit::Failure> {
    Ok(String::new())
}
