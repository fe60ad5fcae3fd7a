"""What a person's privacy costs against a row's."""
